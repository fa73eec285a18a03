"""Operators that keep or reorder dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.rule_cases import (
    Case,
    check_cut,
    check_pin_reason,
    check_same_channels,
    check_units,
    images,
)

CASES = {
    "channels_last_and_back": Case(
        images(lambda m, x: m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 5, a=lambda: nn.Linear(8, 5)), 8 + 5
    ),
    "flip": Case(images(lambda m, x: x.flip(1)), 8),
    "flip_added": Case(images(lambda m, x: x + x.flip(1)), 4),
    "roll_along_channels": Case(
        images(lambda m, x: x.roll(3, 1)), 0, pinned={"stem.weight": r"rolled along its channels \(aten::roll"}
    ),
    "roll_along_pixels": Case(images(lambda m, x: x.roll((1, 2), (2, 3))), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_prunable_units_and_pin_reasons(name):
    check_units(CASES[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_cut_matches_oracles_and_predicted_costs(name, seed):
    check_cut(CASES[name], seed)


SAME_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "to_float_and_back": lambda x: x.float().double(),
    "contiguous_channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "flip_pixels": lambda x: x.flip(2, 3),
    "rotate": lambda x: x.transpose(2, 3),
    "squeezed_and_unsqueezed": lambda x: x.unsqueeze(1).squeeze(1)[None][0],
    "detach": lambda x: x.detach(),
    "turned_image": lambda x: torch.rot90(x, 1, (2, 3)),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


PINNED = {
    "a turn of channels into rows": (
        lambda x: torch.rot90(x, 1, (1, 2)),
        r"turned together with another dimension \(aten::rot90",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])
