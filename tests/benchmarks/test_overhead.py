"""The benchmark of overhead measures what it says."""

from __future__ import annotations

import pytest

from benchmarks.speed.overhead import Setting, cuts, epochs, page, ratios

pytestmark = pytest.mark.filterwarnings("ignore")


def test_each_pair_is_divided_with_by_without():
    assert ratios([1.0, 2.0, 6.0, 3.0, 1.0, 5.0]) == [2.0, 2.0, 5.0]


def test_every_other_epoch_gathers_statistics_of_every_layer(monkeypatch: pytest.MonkeyPatch):
    from lightning_prune.criteria.collector import Collector

    gathered: list[int] = []
    own = Collector.compute

    def counting(self: Collector) -> dict:
        found = own(self)
        gathered.append(len(found))
        return found

    monkeypatch.setattr(Collector, "compute", counting)
    found = epochs(Setting(size=32, batch=2, batches=1, pairs=2))
    assert found.gathers == [False, False, True, True, False, False, True]
    assert len(gathered) == 3
    assert min(gathered) > 40
    assert len(found.times) == 7
    assert len(found.peaks) == 2
    assert min(found.peaks) > 0
    assert all(time.cpu > 0 for time in found.times)


def test_cuts_are_measured_and_shown():
    times, peak = cuts(Setting(size=32, cuts=1))
    assert len(times) == 1
    assert times[0].cpu > 0 < peak
    clock = {"epoch": 10.0, "statistics": 0.031, "statistics_quartiles": [0.02, 0.04], "cut": times[0].cpu}
    clock |= {"cut_in_batches": 2.0, "cut_share_of_epoch": 0.1}
    found = {"peak_mb": {"epoch": 1.0, "statistics": 2.0, "cut": peak}, "wall": clock, "cpu": clock}
    text = page(found, Setting(), {"date": "today", "versions": {"torch": "2"}, "machine": "a machine"})
    assert "3.1% longer" in text
    assert f"A cut takes {times[0].cpu:.2f} s" in text
