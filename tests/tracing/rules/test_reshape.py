"""Reshapes, by constants, attributes and sizes of tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.nets import Net
from tests.support.rule_cases import Case, check_cut, check_same_channels, check_units, conv, images


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


CASES = {
    "flatten_to_linear_over_several_pixels": Case(
        lambda: nn.Sequential(
            conv(3, 6), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 2)
        ),
        6 + 5,
    ),
    "view_with_a_free_size": Case(
        lambda: Net(
            lambda m, x: m.head(m.a(x).view(x.shape[0], -1)), a=conv(3, 6), head=nn.Linear(6 * 64, 2)
        ),
        6,
    ),
    "view_by_a_number_in_the_code": Case(
        lambda: Net(lambda m, x: m.head(m.a(x).view(2, 6 * 64)), a=conv(3, 6), head=nn.Linear(6 * 64, 2)),
        0, pinned={"a.weight": "."},
    ),
    "channel_shuffle_by_a_number": Case(images(lambda m, x: shuffled(x, 2)), 4),
    "channel_shuffle_by_an_attribute": Case(images(lambda m, x: shuffled(x, m.groups), groups=4), 2),
    "channel_shuffle_by_a_computed_number": Case(images(lambda m, x: shuffled(x, m.groups // 2), groups=4), 4),
    "unflatten_by_a_number": Case(
        images(lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), 4
    ),
    "unflatten_by_its_own_shape": Case(
        images(lambda m, x: x.unflatten(1, (4, x.shape[1] // 4)).transpose(1, 2).flatten(1, 2)), 2
    ),
    "half_of_the_channels_moved_into_the_batch": Case(
        images(lambda m, x: x.reshape(x.shape[0] * 2, x.shape[1] // 2, 8, 8).relu().reshape(x.shape)), 4
    ),
    "view_by_another_layers_attribute": Case(
        lambda: Net(
            lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 2).view(-1, m.a.out_channels * 4)),
            a=conv(3, 8), head=nn.Linear(32, 2),
        ),
        8,
    ),
    "view_by_an_attribute_of_channels_times_pixels": Case(
        lambda: Net(
            lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 2).view(-1, m.width)),
            a=conv(3, 8), head=nn.Linear(32, 2), width=32,
        ),
        8,
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
    "flatten_and_unflatten": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "windows_and_back": lambda x: x.view(2, -1, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).flatten(0, 2),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])
