"""Pointwise operators and reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.nets import Net
from tests.support.rule_cases import (
    Case,
    check_cut,
    check_pin_reason,
    check_same_channels,
    check_statistics,
    check_units,
    check_zeroed_consumers_only,
    conv,
    images,
    parameter,
)


def film(m: nn.Module, x: Tensor) -> Tensor:
    scale, shift = m.f(x.mean((2, 3)))[..., None, None].chunk(2, 1)
    return x * scale + shift


def selective_kernels(m: nn.Module, x: Tensor) -> Tensor:
    both = torch.stack([m.a(x), m.b(x)], 1)
    weights = m.f(both.sum(1).mean((2, 3))).view(2, 2, -1).softmax(1)
    return (both * weights[..., None, None]).sum(1)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x.relu_().mul_(m.gate(x)).add_(m.other(x))
    return x


CASES = {
    "residual": Case(
        images(lambda m, x: x + m.b(F.relu(m.a(x))), a=lambda: conv(8, 6), b=lambda: conv(6, 8)), 8 + 6
    ),
    "two_residuals_in_a_row_share_the_trunk": Case(
        images(lambda m, x: (x + m.a(x)) + m.b(x + m.a(x)), a=lambda: conv(8, 8), b=lambda: conv(8, 8)), 8
    ),
    "gate_by_the_input_of_one_channel": Case(
        lambda: Net(lambda m, x: m.head(m.a(x) * x[:, :1]), a=conv(3, 5), head=conv(5, 2)), 5
    ),
    "sum_with_the_input": Case(
        lambda: Net(lambda m, x: m.head(x + m.b(m.a(x))), a=conv(3, 5), b=conv(5, 3), head=conv(3, 2)),
        5, pinned={"b.weight": "meets a tensor of fixed size"},
    ),
    "squeeze_and_excitation": Case(
        images(
            lambda m, x: x * m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid(),
            down=lambda: nn.Conv2d(8, 3, 1), up=lambda: nn.Conv2d(3, 8, 1),
        ),
        8 + 3,
    ),
    "squeeze_and_excitation_by_linear_layers": Case(
        images(
            lambda m, x: x * m.up(F.relu(m.down(x.mean((2, 3))))).sigmoid()[:, :, None, None],
            down=lambda: nn.Linear(8, 3), up=lambda: nn.Linear(3, 8),
        ),
        8 + 3,
    ),
    "spatial_gate_of_one_channel": Case(
        images(lambda m, x: x * m.gate(x).sigmoid(), gate=lambda: conv(8, 1)), 8 + 1
    ),
    "sum_over_channels": Case(images(lambda m, x: x * x.sum(1, keepdim=True)), 8, zeroed=False),
    "film": Case(images(film, f=lambda: nn.Linear(8, 16)), 8, zeroed=True),
    "selective_kernels": Case(
        images(selective_kernels, a=lambda: conv(8, 8), b=lambda: conv(8, 8), f=lambda: nn.Linear(8, 16)), 8 + 8
    ),
    "glu": Case(images(lambda m, x: F.glu(x, 1), 4), 4),
    "prelu_per_channel": Case(images(lambda m, x: m.p(x), p=lambda: nn.PReLU(8)), 8),
    "prelu_of_one_slope": Case(images(lambda m, x: m.p(x), p=lambda: nn.PReLU()), 8),
    "softmax_over_pixels": Case(images(lambda m, x: x * x.flatten(2).softmax(-1).view_as(x)), 8),
    "maximum_of_two": Case(images(lambda m, x: torch.max(x, m.a(x)), a=lambda: conv(8, 8)), 8),
    "where": Case(images(lambda m, x: torch.where(x > 0, x, m.a(x)), a=lambda: conv(8, 8)), 8, dead=False),
    "in_place_operators": Case(images(in_place, gate=lambda: conv(8, 8), other=lambda: conv(8, 8)), 8),
    "scale_per_channel": Case(
        images(lambda m, x: x * m.scale[None, :, None, None], scale=parameter(8)), 8
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
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "elu": F.elu,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "clamp": lambda x: x.clamp(-1, 1),
    "abs": torch.abs,
    "square": torch.square,
    "power": lambda x: x**3,
    "times_two": lambda x: 2 * x,
    "negative": torch.neg,
    "mean_of_pixels": lambda x: x.mean((2, 3), keepdim=True),
    "max_of_pixels": lambda x: x.amax((2, 3), keepdim=True),
    "standard_deviation_of_pixels": lambda x: x.std((2, 3), keepdim=True),
    "masked_fill": lambda x: x.masked_fill(torch.eye(8, dtype=torch.bool), 0.0),
    "in_place_relu": lambda x: x.relu_(),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


NOT_ZERO_AT_ZERO = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
    "cos": torch.cos,
    "hardsigmoid": F.hardsigmoid,
    "logsigmoid": F.logsigmoid,
    "plus_one": lambda x: x + 1,
    "log_softmax_over_pixels": lambda x: x.flatten(2).log_softmax(2).view_as(x),
}


@pytest.mark.parametrize("name", NOT_ZERO_AT_ZERO)
def test_without_f_of_zero_equal_to_zero_only_zeroed_consumers_agree(name):
    check_zeroed_consumers_only(NOT_ZERO_AT_ZERO[name])


STATISTICS: dict[str, tuple[Callable[[nn.Module, Tensor, list[int]], Tensor], dict[str, Any]]] = {
    "softmax": (lambda m, x, k: x[..., k].softmax(-1), {"n": lambda: nn.Softmax(-1)}),
    "length": (
        lambda m, x, k: F.normalize(x[..., k], dim=-1),
        {"n": lambda: Net(lambda m, x: F.normalize(x, dim=-1))},
    ),
    "mean": (
        lambda m, x, k: x[..., k] - x[..., k].mean(-1, keepdim=True),
        {"n": lambda: Net(lambda m, x: x - x.mean(-1, keepdim=True))},
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_taken_over_the_remaining_features(name):
    check_statistics(*STATISTICS[name])


PINNED = {
    "a constant per channel": (
        lambda x: x * torch.arange(8.0).double()[:, None, None],
        r"meets a tensor of fixed size \(aten::mul",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])
