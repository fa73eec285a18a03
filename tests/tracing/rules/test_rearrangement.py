"""Operators that move channels into positions and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.nets import Net
from tests.support.rule_cases import Case, check_cut, check_same_channels, check_units, conv, images

CASES = {
    "pixel_shuffle": Case(images(lambda m, x: F.pixel_shuffle(x, 2), 2), 2),
    "pixel_unshuffle": Case(images(lambda m, x: F.pixel_unshuffle(x, 2), 32), 8),
    "channel_shuffle_module": Case(images(lambda m, x: m.s(x), s=lambda: nn.ChannelShuffle(2)), 4),
    "unfold_and_fold": Case(
        images(lambda m, x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)), 8
    ),
    "unfold_to_linear": Case(
        lambda: Net(
            lambda m, x: m.head(F.relu(m.a(F.unfold(m.stem(x), 3).transpose(1, 2)))),
            stem=conv(3, 4), a=nn.Linear(36, 5), head=nn.Linear(5, 2),
        ),
        4 + 5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_prunable_units_and_pin_reasons(name):
    check_units(CASES[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_cut_matches_oracles_and_predicted_costs(name, seed):
    check_cut(CASES[name], seed)


SAME_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold_pixels": lambda x: x.unfold(2, 3, 1).sum(-1),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])
