"""A training whose cuts are too few for its budget says so before it begins."""

from __future__ import annotations

import re

import pytest

from lightning_prune.pruning.regular_cuts import missing_cuts, with_amount
from lightning_prune.pruning.schedules import Linear, Timing
from lightning_prune.selection.policy import PruningPolicy


@pytest.mark.parametrize(
    ("budget", "amount", "timing", "epochs", "expected"),
    [
        (0.5, 0.1, Timing(), 6, ""),
        (
            0.5,
            0.1,
            Timing(),
            5,
            "5 epochs have 4 cuts, macs needs 5: about 60% .* 6 epochs, .*raise amount to 0.13",
        ),
        (0.5, 0.25, Timing(every=3, start=2), 5, "5 epochs have 1 cut,.* 75% .* 6 epochs, .* 0.5$"),
        (0.5, 0.25, Timing(every=3, start=2), 6, ""),
        (0.5, 0.1, Timing(schedule=Linear(2)), 3, ""),
        (0.5, 0.1, Timing(unit="steps"), 3, ""),
        (0.5, 0.1, Timing(), -1, ""),
        (1e6, 0.1, Timing(), 3, ""),
    ],
)
def test_the_number_of_cuts_is_compared_with_the_budget(
    budget: float, amount: float, timing: Timing, epochs: int, expected: str
) -> None:
    text = missing_cuts(PruningPolicy({"macs": budget}, amount={"macs": amount}), timing, epochs)
    assert re.search(expected, text) if expected else text == "", text


def test_an_amount_without_a_resource_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="amount must say of which resource how much a cut removes"):
        with_amount(PruningPolicy({"macs": 0.5}), 0.3, None)  # type: ignore[arg-type]
