"""The comparison of carried and new optimizers runs, continues after a stop, and tabulates paired differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.quality import optimizer
from benchmarks.quality.optimizer import VARIANTS, Module, measure, table


@pytest.mark.filterwarnings("ignore")
def test_every_variant_is_measured_once_and_only_missing_runs_are_repeated(tmp_path: Path, monkeypatch):
    lines: list[str] = []
    scores = measure(["brain"], "small", [1], tmp_path, False, lines.append)
    assert len(lines) == len(VARIANTS) == 4
    assert set(scores["brain"]) == set(VARIANTS)
    saved = json.loads((tmp_path / "optimizer-small-unrepaired.json").read_text())
    del saved["brain 1 carry"]
    (tmp_path / "optimizer-small-unrepaired.json").write_text(json.dumps(saved))
    monkeypatch.setattr(optimizer, "run", lambda *_: 0.25)
    again = measure(["brain"], "small", [1], tmp_path, False, lines.append)
    assert len(lines) == 5
    assert again["brain"] == {**scores["brain"], "carry": [0.25]}


def test_the_table_shows_medians_and_paired_differences_from_reset():
    rows = {variant: [0.5, 0.7, 0.6] for variant in VARIANTS} | {"carry": [0.6, 0.71, 0.59]}
    assert "| carry | 0.600, +1.0 (-1.0 to +10.0) |" in table({"brain": rows})


def test_a_new_optimizer_continues_the_cosine():
    class Progress:
        global_step = 5

    module = Module(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), steps=10, rate=0.2)
    module._trainer = Progress()  # type: ignore[assignment]
    assert module.configure_optimizers()["optimizer"].param_groups[0]["lr"] == pytest.approx(0.1)
