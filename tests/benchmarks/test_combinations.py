"""A few combinations, and errors that must be found."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import pytest
import torch

from benchmarks.robustness import combination_run
from benchmarks.robustness.combination_run import OPTIMIZERS, Combination, Outcome, run
from benchmarks.robustness.combinations import everything, page, pairs

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [
    Combination("SGD", "reset", accumulate=4),
    Combination("AdamW fused", "carry", "bf16-mixed", averaged=True),
    Combination("Adafactor", "carry", accumulate=4),
    Combination("Adagrad", "reset", "bf16-mixed", averaged=True),
    Combination("RMSprop centered", "carry", compiled=True),
    Combination("NAdam", "reset", "bf16-mixed", compiled=True, accumulate=4, averaged=True),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.optimizer}-{row.state}")
def test_nothing_is_wrong(row):
    outcome = run(row, "eager")
    assert outcome.wrong == []
    assert outcome.shares[-1] <= 0.5


def test_an_optimizer_of_other_parameters_is_reported(monkeypatch: pytest.MonkeyPatch):
    """The error of pruners that replace parameters: the optimizer still has the old ones."""

    def stale(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(p.detach().clone()) for p in parameters], lr=0.1)

    monkeypatch.setitem(OPTIMIZERS, "stale", stale)
    wrong = run(Combination("stale")).wrong
    assert "epoch 0: net.0.weight did not change" in wrong
    assert any(message.startswith("loss") for message in wrong)


def test_optimizer_state_of_another_shape_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(combination_run, "_valid_shapes", lambda parameter: {(), tuple(parameter.shape[:1])})
    assert "epoch 0: state of net.0.weight has shape (16, 1, 3, 3)" in run(Combination("Adam")).wrong


def test_few_combinations_contain_every_pair_of_settings():
    rows = everything()
    few = pairs(rows)
    assert len(few) < len(rows) / 10
    assert all(_pairs(row) <= set().union(*map(_pairs, few)) for row in rows)


def _pairs(row: Combination) -> set[Any]:
    return set(combinations(asdict(row).items(), 2))


def test_the_page_counts_right_combinations():
    right = Outcome([], [1.0] * 14, [0.75, 0.5])
    text = page(
        [(ROWS[0], right), (ROWS[1], replace(right, wrong=["ranks have different weights"]))], "command"
    )
    assert "**1 of 2 combinations are right**" in text
    assert "| ranks have different weights |" in text
