"""Concatenation, stacking, padding, and writing into tensors."""

from __future__ import annotations

from collections.abc import Callable

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
    check_units,
    conv,
    images,
)


def dense_block(m: nn.Module, x: Tensor) -> Tensor:
    first = m.first(x)
    second = m.second(torch.cat([x, first], 1))
    return torch.cat([second, x, first], 1)


def written_views(m: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, :4] = m.upper(x)[:, :, :4]
    out[:, :, 4:] = m.lower(x)[:, :, 4:]
    return out


def written_channels(m: nn.Module, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :] = m.other(x)
    return out


def written_stride(m: nn.Module, x: Tensor) -> Tensor:
    out = x.clone()
    out[:, ::2] = m.a(x)
    return out


def written_half(m: nn.Module, x: Tensor) -> Tensor:
    out = x.clone()
    out[:, : x.shape[1] // 2] = m.a(x)
    return out


CASES = {
    "concat_at_different_offsets": Case(
        images(
            lambda m, x: m.c(torch.cat([m.a(x), x, m.b(x)], 1)), 7,
            a=lambda: conv(8, 3), b=lambda: conv(8, 5), c=lambda: conv(16, 7),
        ),
        8 + 3 + 5 + 7,
    ),
    "concat_with_itself": Case(images(lambda m, x: torch.cat([x, x], 1), 16), 8),
    "concat_with_the_input": Case(
        lambda: Net(lambda m, x: m.head(torch.cat([x, m.a(x)], 1)), a=conv(3, 5), head=conv(8, 2)), 5
    ),
    "dense_connections": Case(
        images(dense_block, 18, first=lambda: conv(8, 4), second=lambda: conv(12, 6)), 8 + 4 + 6
    ),
    "circular_padding": Case(
        images(lambda m, x: m.a(x), 5, a=lambda: conv(8, 5, padding_mode="circular")), 8 + 5
    ),
    "stack_and_sum": Case(images(lambda m, x: torch.stack([x, m.a(x)], 1).sum(1), a=lambda: conv(8, 8)), 8),
    "stack_and_flatten": Case(
        images(lambda m, x: torch.stack([x, m.a(x)], 1).flatten(1, 2), 16, a=lambda: conv(8, 8)), 8
    ),
    "stack_interleaved": Case(
        images(lambda m, x: torch.stack([x, m.a(x)], 2).flatten(1, 2), 16, a=lambda: conv(8, 8)), 8
    ),
    "padding_along_channels": Case(images(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 3)), 12), 8),
    "written_at_every_second_channel": Case(images(written_stride, a=lambda: conv(8, 4)), 4),
    "written_into_half_of_its_own_shape": Case(images(written_half, a=lambda: conv(8, 4)), 4),
    "shortcut_padded_with_zeros": Case(
        images(lambda m, x: m.a(x) + F.pad(x, (0, 0, 0, 0, 2, 2)), 12, a=lambda: conv(8, 12)), 8,
        pinned={"a.weight": "belongs to a tensor of fixed size"},
    ),
    "shortcut_with_zeros_like_itself": Case(
        images(lambda m, x: m.a(x) + torch.cat([x, torch.zeros_like(x)], 1), 16, a=lambda: conv(8, 16)), 8
    ),
    "stacked_and_one_selected": Case(
        images(lambda m, x: torch.stack([m.a(x), m.b(x)])[1] + x, a=lambda: conv(8, 8), b=lambda: conv(8, 8)), 8
    ),
    "concat_along_pixels": Case(images(lambda m, x: torch.cat([x, m.a(x)], 2), a=lambda: conv(8, 8)), 8),
    "views_written_into": Case(images(written_views, upper=lambda: conv(8, 8), lower=lambda: conv(8, 8)), 8),
    "channels_written_into": Case(
        images(written_channels, 16, other=lambda: conv(8, 8)), 0,
        pinned=dict.fromkeys(("stem.weight", "other.weight"), r"meets a dimension of fixed size \(aten::copy_"),
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
    "pad_zeros": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_circular": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


PINNED = {
    "circular padding of channels": (
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), mode="circular"),
        r"padded along its channels \(aten::pad",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])
