"""The benchmark of overhead measures what it reports."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.speed.overhead import Setting, cuts, epochs, page, ratios
from lightning_prune.criteria.collector import Collector

pytestmark = pytest.mark.filterwarnings("ignore")


def test_each_pair_gives_with_over_without():
    assert ratios([1.0, 2.0, 6.0, 3.0, 1.0, 5.0]) == [2.0, 2.0, 5.0]


def test_every_other_epoch_collects_statistics_of_every_layer(monkeypatch: pytest.MonkeyPatch):
    layers: list[int] = []
    compute = Collector.compute

    def counting(self: Collector) -> dict:
        statistics = compute(self)
        layers.append(len(statistics))
        return statistics

    monkeypatch.setattr(Collector, "compute", counting)
    training = epochs(Setting(size=32, batch=2, batches=1, pairs=2))
    assert training.gathers == [False, False, True, True, False, False, True]
    assert len(layers) == 3
    assert min(layers) > 40
    assert len(training.times) == 7
    assert len(training.peaks) == 2
    assert min(training.peaks) > 0
    assert all(time.cpu > 0 for time in training.times)


def test_cuts_are_measured_and_shown():
    times, peak = cuts(Setting(size=32, cuts=1))
    assert len(times) == 1
    assert times[0].cpu > 0 < peak
    clock = {"epoch": 10.0, "statistics": 0.031, "statistics_quartiles": [0.02, 0.04], "cut": times[0].cpu}
    clock |= {"cut_in_batches": 2.0, "cut_share_of_epoch": 0.1}
    numbers = {"peak_mb": {"epoch": 1.0, "statistics": 2.0, "cut": peak}, "wall": clock, "cpu": clock}
    head = {"date": "today", "versions": {"torch": "2"}, "machine": "a machine", "setting": asdict(Setting())}
    text = page({**head, **numbers})
    assert "3.1% longer" in text
    assert f"A cut takes {times[0].cpu:.2f} s" in text
