"""Expanded, repeated and newly created dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.rule_cases import (
    TOKENS,
    Case,
    check_cut,
    check_same_channels,
    check_units,
    conv,
    images,
    parameter,
    tokens,
)


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
    return x + m.scale * m.block(x)


CASES = {
    "repeat": Case(images(lambda m, x: x.repeat(1, 3, 1, 1), 24), 8),
    "repeat_interleave": Case(images(lambda m, x: x.repeat_interleave(2, 1), 16), 8),
    "blur_with_an_expanded_kernel": Case(
        images(
            lambda m, x: F.conv2d(x, m.k.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]),
            k=lambda: nn.Buffer(torch.rand(1, 1, 3, 3)),
        ),
        8, macs=False,
    ),
    "blur_with_a_kernel_per_channel": Case(
        images(
            lambda m, x: F.conv2d(x, m.k, groups=m.channels), k=lambda: nn.Buffer(torch.rand(8, 1, 3, 3)), channels=8
        ),
        8,
    ),
    "shortcut_repeated_to_match": Case(
        images(lambda m, x: m.a(x) + x.repeat(1, m.a(x).shape[1] // x.shape[1], 1, 1), 16, a=lambda: conv(8, 16)), 8
    ),
    "a_blur_that_is_learnt_once": Case(
        images(
            lambda m, x: F.conv2d(x, m.w.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], padding=1),
            w=parameter(1, 1, 3, 3),
        ), 8,
    ),
    "class_token_positions_and_layer_scale": Case(
        tokens(
            class_token, token=parameter(1, 1, 12), position=parameter(1, 6, 12), scale=parameter(12),
            block=lambda: nn.Linear(12, 12),
        ),
        12, TOKENS,
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
    "expand_to_more_pixels": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
    "blurred_by_a_repeated_kernel": lambda x: F.conv2d(
        x, torch.ones(1, 1, 3, 3).double().repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], padding=1
    ),
    "blurred_by_an_expanded_kernel": lambda x: F.conv2d(
        x, torch.ones(1, 1, 3, 3).double().expand(x.shape[1], 1, 3, 3), groups=x.shape[1], padding=1
    ),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])
