"""The second zoo: its command on two tiny networks, its catalogue, and what its verdicts mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("monai")

from benchmarks.zoo import more
from benchmarks.zoo.more_report import facts
from benchmarks.zoo.strangers import cut
from benchmarks.zoo.strangers.case import Case, images
from benchmarks.zoo.strangers.catalogue import catalogue
from lightning_prune import prune_

NETWORKS = ("transformers/Llama", "monai/UNet-2d")


def test_two_networks_are_cut_right_and_not_run_again(tmp_path: Path) -> None:
    command = ["--folder", str(tmp_path / "rows"), "--docs", str(tmp_path), *NETWORKS]
    more.main(command)
    stored = json.loads((tmp_path / "data" / "zoo_more.json").read_text())
    rows = {row["network"]: row for row in stored["rows"]}
    assert set(rows) == set(NETWORKS)
    for row in rows.values():
        assert row["status"] == "cut"
        assert row["half"]["verdict"] == row["random"]["verdict"] == "right"
        assert row["half"]["share"] <= 0.5
        assert min(row["half"]["masked"], row["random"]["masked"]) < 1e-6
    assert rows["transformers/Llama"]["random"]["statistics"] > 0  # of the RMS norms
    assert stored["summary"]["wrong"] == 0
    assert stored["summary"]["half"] == stored["summary"]["cut"] == 2
    page = (tmp_path / "zoo_more.md").read_text()
    assert "0 of 2 networks wrong" in page
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path / "rows").iterdir())]
    more.main(command)
    assert times == [file.stat().st_mtime_ns for file in sorted((tmp_path / "rows").iterdir())]


def test_catalogue_has_no_name_twice_and_enough_of_each() -> None:
    cases = catalogue()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) >= 120
    counts = {
        package: sum(case.package == package for case in cases) for package in {c.package for c in cases}
    }
    assert counts["transformers"] >= 40
    assert counts["monai"] >= 20
    assert counts["dynamic_network_architectures"] >= 4
    assert counts["ultralytics"] >= 10


def test_a_missing_package_is_a_row() -> None:
    row = cut.measure(Case("no/net", "no_such_package", nn.Identity, images(3, 8, 8)))
    assert row["status"] == "not installed"
    assert facts([{**row, "network": "no/net"}])["not_installed"] == 1


def test_a_cut_that_differs_from_the_oracle_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def wrong_prune_(model: nn.Module, *args: Any) -> None:
        prune_(model, *args)
        model[2].weight.data = model[2].weight.data.flip(1)

    monkeypatch.setattr(cut, "prune_", wrong_prune_)
    row = cut.measure(Case("made/up", "torch", build, images(3, 8, 8)))
    assert (row["status"], row["half"]["verdict"], row["free"]["verdict"]) == ("wrong",) * 3
    assert facts([{**row, "network": "made/up"}])["wrong"] == 1
