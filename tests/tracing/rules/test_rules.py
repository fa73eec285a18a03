"""One tiny network per operator or pattern: what is free, what is pinned and why, and the cut is exact.

Every case says how many units may go, so a tie too many shows as well as a tie too few; every layer that may
not shrink must be named, with the reason that the user is given. Double precision leaves no room for "nearly".
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.testing import randomise_, with_dead_filters
from tests.support.nets import Attention, Net, counted_macs, cut, parameters, some

IMAGE, TOKENS, SIGNAL, VOLUME = (2, 3, 8, 8), (2, 5, 7), (2, 3, 16), (2, 3, 6, 6, 6)
OUTPUT = "is the network's output"


@dataclass
class Case:
    """A network, the number of units that may go, and the layers that may not shrink, with the reason."""

    build: Callable[[], nn.Module]
    units: int
    shape: tuple[int, ...] = IMAGE
    pinned: dict[str, str] = field(default_factory=dict)  # besides the head
    dead: bool = True  # False: some f(0) is not 0
    zeroed: bool = True  # False: something else than a weight reads the filters
    macs: bool = True  # False: torch's counter misses an operator
    mixes: bool = False  # True: takes statistics across channels, though not in what reaches the output

    @property
    def example(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).double()


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def images(run: Callable[..., Tensor], out: int = 8, **parts: Any) -> Callable[[], nn.Module]:
    """stem (3 -> 8 channels), ``run(m, x)``, head (``out`` -> 2 channels)."""

    def build() -> nn.Module:
        made = {name: part() if callable(part) else part for name, part in parts.items()}
        return Net(lambda m, x: m.head(run(m, m.stem(x))), stem=conv(3, 8), **made, head=conv(out, 2, 1))

    return build


def tokens(run: Callable[..., Tensor], dim: int = 12, **parts: Any) -> Callable[[], nn.Module]:
    """embed (7 -> ``dim``), ``run(m, x)``, head (``dim`` -> 2), on (batch, token, feature)."""

    def build() -> nn.Module:
        made = {name: part() if callable(part) else part for name, part in parts.items()}
        return Net(
            lambda m, x: m.head(run(m, m.embed(x))), embed=nn.Linear(7, dim), **made, head=nn.Linear(dim, 2)
        )

    return build


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def heads_by_hand(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.attention(x)


def fused(mask: Callable[[nn.Module], Tensor | None]) -> Callable[..., Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part.view(b, n, m.num_heads, -1).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(m))
        return m.proj(x.transpose(1, 2).reshape(b, n, -1))

    return run


def non_local(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (part(x).flatten(2) for part in (m.q, m.k, m.v))
    return x + (torch.bmm(v, torch.bmm(q.transpose(1, 2), k).softmax(1))).view_as(x)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x.relu_().mul_(m.gate(x)).add_(m.other(x))
    return x


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


def dense_block(m: nn.Module, x: Tensor) -> Tensor:
    first = m.first(x)
    second = m.second(torch.cat([x, first], 1))
    return torch.cat([second, x, first], 1)


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
    return x + m.scale * m.block(x)


def written_stride(m: nn.Module, x: Tensor) -> Tensor:
    out = x.clone()
    out[:, ::2] = m.a(x)
    return out


def written_half(m: nn.Module, x: Tensor) -> Tensor:
    out = x.clone()
    out[:, : x.shape[1] // 2] = m.a(x)
    return out


def film(m: nn.Module, x: Tensor) -> Tensor:
    scale, shift = m.f(x.mean((2, 3)))[..., None, None].chunk(2, 1)
    return x * scale + shift


def selective_kernels(m: nn.Module, x: Tensor) -> Tensor:
    both = torch.stack([m.a(x), m.b(x)], 1)
    weights = m.f(both.sum(1).mean((2, 3))).view(2, 2, -1).softmax(1)
    return (both * weights[..., None, None]).sum(1)


def grouped_queries(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x).view(2, 5, m.num_heads, m.head_dim)
    k = m.k(x).view(2, 5, m.num_kv_heads, m.head_dim)
    return m.o((q * k.repeat_interleave(m.num_heads // m.num_kv_heads, 2)).reshape(2, 5, -1))


def rotary(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x)
    half = q.shape[-1] // 2
    return m.o(q + torch.cat([-q[..., half:], q[..., :half]], -1) * m.sine)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


CASES = {
    # -- branches ---------------------------------------------------------------------------------------------
    "residual": Case(
        images(lambda m, x: x + m.b(F.relu(m.a(x))), a=lambda: conv(8, 6), b=lambda: conv(6, 8)), 8 + 6
    ),
    "two_residuals_in_a_row_share_the_trunk": Case(
        images(lambda m, x: (x + m.a(x)) + m.b(x + m.a(x)), a=lambda: conv(8, 8), b=lambda: conv(8, 8)), 8
    ),
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
    "gate_by_the_input_of_one_channel": Case(
        lambda: Net(lambda m, x: m.head(m.a(x) * x[:, :1]), a=conv(3, 5), head=conv(5, 2)), 5
    ),
    "sum_with_the_input": Case(
        lambda: Net(lambda m, x: m.head(x + m.b(m.a(x))), a=conv(3, 5), b=conv(5, 3), head=conv(3, 2)),
        5, pinned={"b.weight": "meets a tensor of fixed size"},
    ),
    # -- convolutions ---------------------------------------------------------------------------------------------
    "grouped": Case(images(lambda m, x: m.g(x), 12, g=lambda: conv(8, 12, groups=4)), 2 + 3),
    "depthwise": Case(images(lambda m, x: m.d(x), d=lambda: conv(8, 8, groups=8)), 8),
    "depthwise_with_multiplier": Case(images(lambda m, x: m.d(x), 16, d=lambda: conv(8, 16, groups=8)), 8),
    "depthwise_by_a_number_in_the_code": Case(
        images(lambda m, x: F.conv2d(m.a(x), m.w, groups=6), 6, a=lambda: conv(8, 6), w=parameter(6, 1, 3, 3)),
        8, pinned={"a.weight": "written as the number 6", "w": "written as the number 6"},
    ),
    "transposed": Case(images(lambda m, x: m.t(x), 6, t=lambda: nn.ConvTranspose2d(8, 6, 2, 2)), 8 + 6),
    "transposed_grouped": Case(
        images(lambda m, x: m.t(x), 6, t=lambda: nn.ConvTranspose2d(8, 6, 2, 2, groups=2)), 4 + 3
    ),
    "transposed_depthwise": Case(
        images(lambda m, x: m.t(x), t=lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8)), 8
    ),
    "transposed_depthwise_with_multiplier": Case(
        images(lambda m, x: m.t(x), 16, t=lambda: nn.ConvTranspose2d(8, 16, 2, 2, groups=8)),
        2, pinned={"stem.weight": "several filters in its group of a transposed convolution"},
    ),
    "dilated_strided_and_padded": Case(
        images(lambda m, x: m.a(x), 5, a=lambda: nn.Conv2d(8, 5, 3, 2, 2, 2)), 8 + 5
    ),
    "circular_padding": Case(
        images(lambda m, x: m.a(x), 5, a=lambda: conv(8, 5, padding_mode="circular")), 8 + 5
    ),
    "one_dimensional": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 2, 1)),
        6, SIGNAL,
    ),
    "three_dimensional": Case(
        lambda: nn.Sequential(
            nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(6, 4, 2),
            nn.Conv3d(4, 2, 1),
        ),
        6 + 4, VOLUME,
    ),
    # -- gates ------------------------------------------------------------------------------------------------
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
    # -- norms ------------------------------------------------------------------------------------------------
    "batch_norm": Case(images(lambda m, x: F.relu(m.n(x)), n=lambda: nn.BatchNorm2d(8)), 8),
    "batch_norm_without_parameters": Case(
        images(lambda m, x: F.relu(m.n(x)), n=lambda: nn.BatchNorm2d(8, affine=False)), 8, dead=False
    ),
    "instance_norm": Case(images(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(8, affine=True)), 8),
    "instance_norm_with_statistics": Case(
        images(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), 8
    ),
    "group_norm_of_one_channel_each": Case(images(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(8, 8)), 8),
    "sum_over_channels": Case(images(lambda m, x: x * x.sum(1, keepdim=True)), 8, zeroed=False),
    # -- reshapes ---------------------------------------------------------------------------------------------
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
    "channels_last_and_back": Case(
        images(lambda m, x: m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 5, a=lambda: nn.Linear(8, 5)), 8 + 5
    ),
    "pixel_shuffle": Case(images(lambda m, x: F.pixel_shuffle(x, 2), 2), 2),
    "pixel_unshuffle": Case(images(lambda m, x: F.pixel_unshuffle(x, 2), 32), 8),
    "channel_shuffle_by_a_number": Case(images(lambda m, x: shuffled(x, 2)), 4),
    "channel_shuffle_by_an_attribute": Case(images(lambda m, x: shuffled(x, m.groups), groups=4), 2),
    "channel_shuffle_by_a_computed_number": Case(images(lambda m, x: shuffled(x, m.groups // 2), groups=4), 4),
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
    # -- parts ------------------------------------------------------------------------------------------------
    "chunk": Case(images(lambda m, x: torch.mul(*x.chunk(2, 1)), 4), 4),
    "chunk_and_concat_all_parts": Case(
        images(
            lambda m, x: torch.cat([*x.chunk(2, 1), m.a(x.chunk(2, 1)[1])], 1), 12, a=lambda: conv(4, 4)
        ),
        4 + 4,
    ),
    "split_equally_by_an_attribute": Case(
        images(lambda m, x: torch.mul(*x.split(m.width, 1)), 4, width=4), 4
    ),
    "split_unequally_by_attributes": Case(
        images(
            lambda m, x: torch.cat([m.a(x.split([m.p, m.q], 1)[0]), m.b(x.split([m.p, m.q], 1)[1])], 1), 9,
            a=lambda: conv(3, 4), b=lambda: conv(5, 5), p=3, q=5,
        ),
        8 + 4 + 5,
    ),
    "split_unequally_by_a_tuple": Case(
        images(lambda m, x: m.a(x.split(m.widths, 1)[1]), 4, a=lambda: conv(5, 4), widths=(3, 5)), 8 + 4
    ),
    "split_by_numbers_in_the_code": Case(
        images(lambda m, x: m.a(x.split([3, 5], 1)[1]), 4, a=lambda: conv(5, 4)),
        4, pinned={"stem.weight": "written as the number"},
    ),
    "split_equally_by_a_number_in_the_code": Case(
        images(lambda m, x: torch.mul(*x.split(4, 1)), 4),
        0, pinned={"stem.weight": "written as the number 4"},
    ),
    "slices_at_an_attribute": Case(
        images(lambda m, x: m.a(x[:, : m.p]) + m.b(x[:, m.p :]), 4, a=lambda: conv(3, 4), b=lambda: conv(5, 4), p=3),
        8 + 4,
    ),
    "slices_at_half_of_its_own_shape": Case(
        images(lambda m, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], 4), 4
    ),
    "gates_after_an_attribute_of_which_one_is_left": Case(  # timm's focalnet
        images(lambda m, x: m.a(x)[:, : m.p].sum(1, keepdim=True) + m.b(x) * m.a(x)[:, m.p :], 5,
               a=lambda: conv(8, 4), b=lambda: conv(8, 5), p=3), 8 + 3 + 5, dead=False, zeroed=False,
        pinned={"a.weight": "is all that a slice leaves"},
    ),
    "slice_at_a_number_in_the_code": Case(
        images(lambda m, x: m.a(x[:, :3]), 4, a=lambda: conv(3, 4)), 4 + 5,
        pinned={"stem.weight": "is sliced at a number in the code"},
    ),
    "every_second_channel": Case(images(lambda m, x: x[:, ::2] + x[:, 1::2], 4), 4),
    "narrow_by_an_attribute": Case(images(lambda m, x: x.narrow(1, 0, m.p), 3, p=3), 8),
    "select_one_channel": Case(
        images(lambda m, x: x * x[:, 0:1] + x.select(1, 1)[:, None]), 6, dead=False,
        pinned={"stem.weight": "is picked by its number|is sliced at a number in the code"},
    ),
    "unbind": Case(
        images(lambda m, x: torch.stack(x.unbind(1)[::-1], 1)), 0,
        pinned={"stem.weight": "is taken apart index by index"},
    ),
    "flip": Case(images(lambda m, x: x.flip(1)), 8),
    "flip_added": Case(images(lambda m, x: x + x.flip(1)), 4),
    "roll_along_channels": Case(
        images(lambda m, x: x.roll(3, 1)), 0, pinned={"stem.weight": r"rolled along its channels \(aten::roll"}
    ),
    "roll_along_pixels": Case(images(lambda m, x: x.roll((1, 2), (2, 3))), 8),
    "stack_and_sum": Case(images(lambda m, x: torch.stack([x, m.a(x)], 1).sum(1), a=lambda: conv(8, 8)), 8),
    "stack_and_flatten": Case(
        images(lambda m, x: torch.stack([x, m.a(x)], 1).flatten(1, 2), 16, a=lambda: conv(8, 8)), 8
    ),
    "stack_interleaved": Case(
        images(lambda m, x: torch.stack([x, m.a(x)], 2).flatten(1, 2), 16, a=lambda: conv(8, 8)), 8
    ),
    "repeat": Case(images(lambda m, x: x.repeat(1, 3, 1, 1), 24), 8),
    "repeat_interleave": Case(images(lambda m, x: x.repeat_interleave(2, 1), 16), 8),
    "padding_along_channels": Case(images(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 3)), 12), 8),
    "shuffled_by_an_index_tensor": Case(
        images(lambda m, x: x[:, torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])]), 0,
        pinned={"stem.weight": "is picked by an index tensor"},
    ),
    "written_at_every_second_channel": Case(images(written_stride, a=lambda: conv(8, 4)), 4),
    "written_into_half_of_its_own_shape": Case(images(written_half, a=lambda: conv(8, 4)), 4),
    "unflatten_by_a_number": Case(
        images(lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), 4
    ),
    "unflatten_by_its_own_shape": Case(
        images(lambda m, x: x.unflatten(1, (4, x.shape[1] // 4)).transpose(1, 2).flatten(1, 2)), 2
    ),
    "half_of_the_channels_moved_into_the_batch": Case(
        images(lambda m, x: x.reshape(x.shape[0] * 2, x.shape[1] // 2, 8, 8).relu().reshape(x.shape)), 4
    ),
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
    "slice_between_two_attributes": Case(
        images(lambda m, x: m.a(x[:, m.p : m.q]), 4, a=lambda: conv(3, 4), p=2, q=5), 4 + 2
    ),
    "shortcut_padded_with_zeros": Case(
        images(lambda m, x: m.a(x) + F.pad(x, (0, 0, 0, 0, 2, 2)), 12, a=lambda: conv(8, 12)), 8,
        pinned={"a.weight": "belongs to a tensor of fixed size"},
    ),
    "shortcut_with_zeros_like_itself": Case(
        images(lambda m, x: m.a(x) + torch.cat([x, torch.zeros_like(x)], 1), 16, a=lambda: conv(8, 16)), 8
    ),
    "shortcut_repeated_to_match": Case(
        images(lambda m, x: m.a(x) + x.repeat(1, m.a(x).shape[1] // x.shape[1], 1, 1), 16, a=lambda: conv(8, 16)), 8
    ),
    "stacked_and_one_selected": Case(
        images(lambda m, x: torch.stack([m.a(x), m.b(x)])[1] + x, a=lambda: conv(8, 8), b=lambda: conv(8, 8)), 8
    ),
    "concat_along_pixels": Case(images(lambda m, x: torch.cat([x, m.a(x)], 2), a=lambda: conv(8, 8)), 8),
    "film": Case(images(film, f=lambda: nn.Linear(8, 16)), 8, zeroed=True),
    "selective_kernels": Case(
        images(selective_kernels, a=lambda: conv(8, 8), b=lambda: conv(8, 8), f=lambda: nn.Linear(8, 16)), 8 + 8
    ),
    # -- activations ------------------------------------------------------------------------------------------
    "glu": Case(images(lambda m, x: F.glu(x, 1), 4), 4),
    "prelu_per_channel": Case(images(lambda m, x: m.p(x), p=lambda: nn.PReLU(8)), 8),
    "prelu_of_one_slope": Case(images(lambda m, x: m.p(x), p=lambda: nn.PReLU()), 8),
    "softmax_over_pixels": Case(images(lambda m, x: x * x.flatten(2).softmax(-1).view_as(x)), 8),
    "maximum_of_two": Case(images(lambda m, x: torch.max(x, m.a(x)), a=lambda: conv(8, 8)), 8),
    "where": Case(images(lambda m, x: torch.where(x > 0, x, m.a(x)), a=lambda: conv(8, 8)), 8, dead=False),
    "in_place_operators": Case(images(in_place, gate=lambda: conv(8, 8), other=lambda: conv(8, 8)), 8),
    "views_written_into": Case(images(written_views, upper=lambda: conv(8, 8), lower=lambda: conv(8, 8)), 8),
    "channels_written_into": Case(
        images(written_channels, 16, other=lambda: conv(8, 8)), 0,
        pinned=dict.fromkeys(("stem.weight", "other.weight"), r"meets a dimension of fixed size \(aten::copy_"),
    ),
    # -- products of activations ------------------------------------------------------------------------------
    "attention_by_hand": Case(tokens(heads_by_hand, attention=Attention), 12 + 4, TOKENS),
    "fused_attention": Case(
        tokens(fused(lambda m: None), qkv=lambda: nn.Linear(12, 24), proj=lambda: nn.Linear(8, 12), num_heads=4),
        12 + 4 + 12, TOKENS, macs=False,
    ),
    "fused_attention_with_a_mask_per_head": Case(
        tokens(
            fused(lambda m: m.mask), mask=lambda: nn.Buffer(torch.randn(4, 5, 5)),
            qkv=lambda: nn.Linear(12, 24), proj=lambda: nn.Linear(8, 12), num_heads=4,
        ),
        12 + 4 + 12, TOKENS, macs=False,
    ),
    "fused_attention_with_a_mask_for_all_heads": Case(
        tokens(
            fused(lambda m: m.mask), mask=lambda: nn.Buffer(torch.randn(5, 5)),
            qkv=lambda: nn.Linear(12, 24), proj=lambda: nn.Linear(8, 12), num_heads=4,
        ),
        12 + 4 + 12, TOKENS, macs=False,
    ),
    "multihead_attention_module": Case(  # its projection in is three times as wide as the embedding
        tokens(lambda m, x: m.mha(x, x, x)[0], mha=lambda: nn.MultiheadAttention(12, 4, batch_first=True)),
        4 + 12,
        TOKENS,
        macs=False,
        mixes=True,  # the mean of the attention over the heads
    ),
    "grouped_query_heads": Case(
        tokens(
            grouped_queries, q=lambda: nn.Linear(12, 12), k=lambda: nn.Linear(12, 6), o=lambda: nn.Linear(12, 12),
            num_heads=4, num_kv_heads=2, head_dim=3,
        ),
        12 + 2 + 12, TOKENS,
    ),
    "rotary_positions": Case(
        tokens(
            rotary, q=lambda: nn.Linear(12, 8), o=lambda: nn.Linear(8, 12),
            sine=lambda: nn.Buffer(torch.rand(5, 8)),
        ),
        12 + 4 + 12, TOKENS,
    ),
    "non_local_block": Case(
        images(non_local, q=lambda: conv(8, 3), k=lambda: conv(8, 3), v=lambda: conv(8, 8)), 8 + 3,
        zeroed=False,
    ),
    "halves_by_tensor_split": Case(images(lambda m, x: sum(torch.tensor_split(x, 2, 1)), 4), 4),
    "a_blur_that_is_learnt_once": Case(
        images(
            lambda m, x: F.conv2d(x, m.w.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], padding=1),
            w=parameter(1, 1, 3, 3),
        ), 8,
    ),
    "einsum_with_a_parameter": Case(
        images(lambda m, x: torch.einsum("bchw,oc->bohw", x, m.w), 6, w=parameter(6, 8)), 8 + 6,
        macs=False,  # with one channel left torch multiplies where it contracted, and counts nothing
    ),
    "einsum_of_activations": Case(
        images(
            lambda m, x: torch.einsum("bchw,bcij->bhwij", x, m.a(x)).flatten(3).permute(0, 3, 1, 2), 64,
            a=lambda: conv(8, 8),
        ),
        8, zeroed=False,
    ),
    "bilinear_product_of_two_branches": Case(
        lambda: Net(
            lambda m, x: m.head(torch.bmm(m.a(x).flatten(2), m.b(x).flatten(2).transpose(1, 2))),
            a=conv(3, 4), b=conv(3, 6), head=nn.Linear(6, 2),
        ),
        6, pinned={"a.weight": OUTPUT},
    ),
    # -- parameters -------------------------------------------------------------------------------------------
    "one_convolution_used_twice": Case(images(lambda m, x: m.a(F.relu(m.a(x))), a=lambda: conv(8, 8)), 8),
    "class_token_positions_and_layer_scale": Case(
        tokens(
            class_token, token=parameter(1, 1, 12), position=parameter(1, 6, 12), scale=parameter(12),
            block=lambda: nn.Linear(12, 12),
        ),
        12, TOKENS,
    ),
    "scale_per_channel": Case(
        images(lambda m, x: x * m.scale[None, :, None, None], scale=parameter(8)), 8
    ),
    "linear_by_a_transposed_parameter": Case(
        tokens(lambda m, x: F.relu(x @ m.w) @ m.w.t(), w=parameter(12, 5)), 5, TOKENS, zeroed=False,
        pinned={"embed.weight": "w is a weight in both directions"},
    ),
}  # fmt: skip


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def graph(case):
    torch.manual_seed(0)
    return trace(case.build().double(), case.example)


def test_frees_and_pins_exactly_the_units_that_it_should(case, graph):
    assert len(graph.prunable) == case.units
    last = "head.weight" if "head.weight" in graph.layers else list(graph.layers)[-1]
    expected = {**case.pinned, last: OUTPUT}
    for name, units in graph.layers.items():
        reasons = {graph.pinned[unit] for unit in units.tolist() if unit in graph.pinned}
        assert bool(reasons) == (name in expected), (name, reasons)
        assert all(re.search(expected[name], reason) for reason in reasons), (name, reasons)
    assert not graph.unsupported
    assert bool(len(graph.statistics_units)) == case.mixes


@pytest.mark.parametrize("seed", range(3))
def test_what_is_cut_is_exactly_what_the_oracles_expect(case, seed):
    torch.manual_seed(seed)
    if not case.units:
        pytest.skip("nothing may go")
    x = case.example
    found = cut(case.build().double(), x, seed=seed, share=(0.3, 0.5, 0.8)[seed])
    assert len(found.remove)
    if case.dead:
        assert found.dead < 1e-12
    if case.zeroed:
        assert found.zeroed < 1e-12
    assert parameters(found.model) == found.graph.cost("params", found.remove) < parameters(found.dense)
    after = trace(found.model, x)
    predicted = found.graph.cost("macs", found.remove)
    assert predicted < found.graph.cost("macs")
    assert after.cost("macs") == predicted
    if case.macs:
        assert after.cost("macs") == counted_macs(found.model, x)


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
    "clone": torch.clone,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "to_float_and_back": lambda x: x.float().double(),
    "contiguous_channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_with_indices": lambda x: F.max_pool2d(x, 3, return_indices=True)[0],
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "lp_pool": lambda x: F.lp_pool2d(x, 2, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_avg_pool_to_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 3),
    "mean_of_pixels": lambda x: x.mean((2, 3), keepdim=True),
    "max_of_pixels": lambda x: x.amax((2, 3), keepdim=True),
    "standard_deviation_of_pixels": lambda x: x.std((2, 3), keepdim=True),
    "cumulative_sum_of_pixels": lambda x: x.cumsum(3),
    "sorted_pixels": lambda x: x.sort(3).values,
    "upsample_nearest": lambda x: F.interpolate(x, scale_factor=2),
    "upsample_nearest_exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "upsample_bilinear": lambda x: F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=True),
    "upsample_bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "downsample_antialiased": lambda x: F.interpolate(x, size=5, mode="bilinear", antialias=True),
    "pad_zeros": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "crop": lambda x: x[:, :, 1:-1, 2:6],
    "crop_with_ellipsis": lambda x: x[..., 1:5],
    "every_second_pixel": lambda x: x[:, :, ::2, ::2],
    "flip_pixels": lambda x: x.flip(2, 3),
    "rotate": lambda x: x.transpose(2, 3),
    "flatten_and_unflatten": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "windows_and_back": lambda x: x.view(2, -1, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).flatten(0, 2),
    "batch_halves": lambda x: torch.cat(x.split(1, 0), 0),
    "pixels_from_an_index_tensor": lambda x: x[:, :, torch.tensor([0, 3, 2])],
    "sampled_on_a_grid": lambda x: F.grid_sample(
        x, torch.linspace(-1, 1, 2 * 5 * 5 * 2).view(2, 5, 5, 2).double(), align_corners=True
    ),
    "squeezed_and_unsqueezed": lambda x: x.unsqueeze(1).squeeze(1)[None][0],
    "masked_fill": lambda x: x.masked_fill(torch.eye(8, dtype=torch.bool), 0.0),
    "detach": lambda x: x.detach(),
    "in_place_relu": lambda x: x.relu_(),
    "expand_to_more_pixels": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
    "unfold_pixels": lambda x: x.unfold(2, 3, 1).sum(-1),
    "turned_image": lambda x: torch.rot90(x, 1, (2, 3)),
    "pad_circular": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "unpooled_pixels": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "batch_by_tensor_split": lambda x: torch.cat(torch.tensor_split(x, 2), 0),
    "blurred_by_a_repeated_kernel": lambda x: F.conv2d(
        x, torch.ones(1, 1, 3, 3).double().repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], padding=1
    ),
    "blurred_by_an_expanded_kernel": lambda x: F.conv2d(
        x, torch.ones(1, 1, 3, 3).double().expand(x.shape[1], 1, 3, 3), groups=x.shape[1], padding=1
    ),
    "matrix_product_over_pixels": lambda x: x @ x.transpose(2, 3),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_an_operator_that_leaves_channels_alone_costs_nobody_a_unit_and_is_exact(name):
    function = SAME_CHANNELS[name]
    x = torch.randn(2, 3, 8, 8).double()
    found = cut(images(lambda m, x: function(x))().double(), x, seed=1)
    assert len(found.graph.prunable) == 8
    assert not found.graph.unsupported
    assert len(found.remove) == 4
    assert found.dead < 1e-12
    assert found.zeroed < 1e-12


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
def test_where_a_zero_does_not_stay_zero_the_zeroed_consumers_still_agree(name):
    function = NOT_ZERO_AT_ZERO[name]
    found = cut(images(lambda m, x: function(x))().double(), torch.randn(2, 3, 8, 8).double(), seed=1)
    assert len(found.graph.prunable) == 8
    assert len(found.remove) == 4
    assert found.zeroed < 1e-12
    assert found.dead > 1e-3  # else the case belongs above


# -- statistics across channels: what stays is computed by hand ------------------------------------------------


def kept_filters(record: Any, name: str) -> list[int]:
    return record.kept[name][0]


def small_of(build: Callable[[], nn.Module], x: Tensor, layer: str, seed: int = 0) -> tuple[Any, ...]:
    """Dense and pruned network, and which filters of ``layer`` survive half of its units going."""
    dense = randomise_(build()).double().eval()
    small = copy.deepcopy(dense)
    graph = trace(small, x)
    units = np.intersect1d(graph.layers[layer], graph.prunable)
    assert set(units) <= set(graph.statistics_units)
    record = prune_(small, graph, some(graph, seed, 0.5, among=units))
    return dense, small, record.kept[layer][graph.filter_dims[layer]]


MIXING: dict[str, tuple[Callable[[nn.Module, Tensor, list[int]], Tensor], dict[str, Any]]] = {
    "layer_norm": (
        lambda m, x, k: F.layer_norm(x[..., k], (len(k),), m.n.weight[k], m.n.bias[k]),
        {"n": lambda: nn.LayerNorm(12)},
    ),
    "layer_norm_without_parameters": (
        lambda m, x, k: F.layer_norm(x[..., k], (len(k),)),
        {"n": lambda: nn.LayerNorm(12, elementwise_affine=False)},
    ),
    "rms_norm": (
        lambda m, x, k: F.rms_norm(x[..., k], (len(k),), m.n.weight[k], 1e-6),
        {"n": lambda: nn.RMSNorm(12, eps=1e-6)},
    ),
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


@pytest.mark.parametrize("name", MIXING)
def test_statistics_over_features_are_those_of_the_features_that_stay(name):
    by_hand, parts = MIXING[name]
    x = torch.randn(TOKENS).double()
    dense, small, kept = small_of(tokens(lambda m, x: m.n(x), **parts), x, "embed.weight")
    expected = by_hand(dense, dense.embed(x), kept) @ dense.head.weight[:, kept].t() + dense.head.bias
    assert len(kept) == 6
    assert torch.allclose(small(x), expected, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_norm_keeps_equal_groups_and_takes_statistics_of_what_stays(groups):
    x = torch.randn(IMAGE).double()
    dense, small, kept = small_of(
        images(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(groups, 8)), x, "stem.weight", seed=1
    )
    by_group = [[k % (8 // groups) for k in kept if k // (8 // groups) == g] for g in range(groups)]
    assert len(kept) == 4
    assert all(positions == by_group[0] for positions in by_group)
    normed = F.group_norm(dense.stem(x)[:, kept], groups, dense.n.weight[kept], dense.n.bias[kept])
    expected = F.conv2d(normed, dense.head.weight[:, kept], dense.head.bias)
    assert small.n.num_groups == groups
    assert torch.allclose(small(x), expected, atol=1e-12)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("norm", [old_weight_norm, parametrizations.weight_norm], ids=["old", "parametrised"])
def test_a_weight_under_weight_norm_loses_filters_and_inputs(norm):
    x = torch.randn(IMAGE).double()

    def build() -> nn.Module:
        return Net(
            lambda m, x: m.head(F.relu(m.b(F.relu(m.a(x))))),
            a=norm(conv(3, 8)),
            b=norm(conv(8, 6)),
            head=conv(6, 2),
        )

    dense, small = (randomise_(build()).double().eval() for _ in range(2))
    small.load_state_dict(dense.state_dict())
    graph = trace(small, x)
    assert len(graph.prunable) == 8 + 6
    record = prune_(small, graph, some(graph, 0, 0.5, among=graph.prunable))
    kept_a, kept_b = record.kept["a.bias"][0], record.kept["b.bias"][0]
    assert 0 < len(kept_a) < 8
    assert 0 < len(kept_b) < 6
    g, v = (
        (dense.b.weight_g, dense.b.weight_v)
        if norm is old_weight_norm
        else (dense.b.parametrizations.weight.original0, dense.b.parametrizations.weight.original1)
    )
    v = v[kept_b][:, kept_a]
    weight = g[kept_b] * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    hidden = F.conv2d(F.relu(dense.a(x))[:, kept_a], weight, dense.b.bias[kept_b], padding=1)
    expected = F.conv2d(F.relu(hidden), dense.head.weight[:, kept_b], dense.head.bias, padding=1)
    assert torch.allclose(small(x), expected, atol=1e-12)


def test_removing_an_input_of_a_weight_under_weight_norm_is_known_to_change_its_filters():
    net = Net(
        lambda m, x: m.head(m.b(m.a(x))),
        a=conv(3, 8),
        b=parametrizations.weight_norm(conv(8, 6)),
        head=conv(6, 2),
    )
    graph = trace(net, torch.zeros(IMAGE))
    assert set(graph.layers["a.weight"]) <= set(graph.statistics_units)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "norm", [old_spectral_norm, parametrizations.spectral_norm], ids=["old", "parametrised"]
)
def test_a_weight_under_spectral_norm_loses_filters_and_keeps_its_inputs(norm):
    """The norm is that of what stays, by the vectors of the power iteration that stay."""
    x = torch.randn(IMAGE).double()

    def build() -> nn.Module:
        return Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 8), b=norm(conv(8, 6)), head=conv(6, 2))

    dense, small = (randomise_(build()).double().eval() for _ in range(2))
    small.load_state_dict(dense.state_dict())
    graph = trace(small, x)
    old = norm is old_spectral_norm
    assert len(graph.prunable) == 6
    assert set(graph.prunable) <= set(graph.statistics_units)
    assert {graph.pinned[unit].partition(" in b")[1] for unit in graph.layers["a.weight"]} == {" in b"}
    kept = prune_(small, graph, graph.prunable[:4]).kept["b.bias"][0]
    inner = dense.b if old else dense.b.parametrizations.weight[0]
    weight = (dense.b.weight_orig if old else dense.b.parametrizations.weight.original)[kept]
    u, v = (inner.weight_u, inner.weight_v) if old else (inner._u, inner._v)
    weight = weight / torch.dot(u[kept], weight.flatten(1) @ v)
    hidden = F.conv2d(dense.a(x), weight, dense.b.bias[kept], padding=1)
    assert torch.allclose(small(x), F.conv2d(hidden, dense.head.weight[:, kept], dense.head.bias, padding=1))


SCALED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "square_root_of_a_shape": lambda m, q: q.shape[-1] ** 0.5,
    "square_root_by_math": lambda m, q: math.sqrt(q.size(-1)),
    "a_shape": lambda m, q: q.shape[-1],
    "one_by_a_shape": lambda m, q: 1 / q.shape[-1],
    "an_attribute": lambda m, q: m.q.out_features,
    "a_tensor": lambda m, q: torch.tensor(q.shape[-1], dtype=q.dtype),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("place", ["on_the_query", "on_the_product"])
def test_a_number_computed_from_a_size_changes_values_only_where_the_graph_or_the_proof_says_so(name, place):
    """The scale of a softmax: with fewer channels all weights change, which no oracle and no user expects."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k = m.q(x), m.k(x).transpose(1, 2)
        scale = SCALED[name](m, q)
        return ((q / scale) @ k if place == "on_the_query" else (q @ k) / scale).softmax(-1) @ x

    x = torch.randn(TOKENS).double()
    net = tokens(run, q=lambda: nn.Linear(12, 6), k=lambda: nn.Linear(12, 6))().double()
    graph = trace(net, x)
    units = graph.layers["q.weight"]
    if set(units) <= set(graph.statistics_units) or set(units) <= set(graph.pinned):
        return
    with pytest.raises(SurgeryError) as refused:
        prune_(net, graph, units[:2])
    assert set(units[:2]) <= set(refused.value.units)


@pytest.mark.parametrize("left", [8, 3, 1])
def test_a_contraction_by_letters_costs_what_torch_counts_while_it_contracts(left):
    x = torch.randn(IMAGE).double()
    net = images(lambda m, x: torch.einsum("bchw,oc->bohw", x, m.w), 6, w=parameter(6, 8))().double()
    graph = trace(net, x)
    remove = graph.layers["stem.weight"][left:]
    prune_(net, graph, remove)
    after, positions = trace(net, x).cost("macs"), 2 * 8 * 8
    assert after == graph.cost("macs", remove)
    assert after - counted_macs(net, x) == (0 if left > 1 else positions * 6)


# -- what users build ------------------------------------------------------------------------------------------


def test_a_frozen_backbone_is_traced_and_cut_like_any_other():
    x = torch.randn(IMAGE).double()
    build = images(lambda m, x: F.relu(m.a(F.relu(x))), 6, a=lambda: conv(8, 6))
    torch.manual_seed(0)
    free = cut(build().double(), x)
    torch.manual_seed(0)
    frozen = cut(build().double().requires_grad_(False), x)
    assert frozen.remove.tolist() == free.remove.tolist()
    assert frozen.record == free.record
    assert len(free.remove) == 7
    assert frozen.dead < 1e-12
    assert not any(p.requires_grad for p in frozen.model.parameters())


def test_several_inputs_keyword_inputs_and_nested_ones():
    def run(m: nn.Module, first: Tensor, more: dict[str, list[Tensor]], *, gate: Tensor) -> Tensor:
        return m.head(torch.cat([m.a(first) * m.g(gate), m.b(more["images"][0])], 1))

    net = Net(run, a=conv(3, 4), b=conv(5, 6), g=conv(1, 4), head=conv(10, 2)).double()
    first, second, gate = (torch.randn(2, n, 8, 8).double() for n in (3, 5, 1))
    small = copy.deepcopy(randomise_(net).eval())
    graph = trace(small, first, {"images": [second]}, gate=gate)
    assert len(graph.prunable) == 4 + 6
    remove = some(graph)
    dead = with_dead_filters(net, graph, remove)
    prune_(small, graph, remove)
    expected = dead(first, {"images": [second]}, gate=gate)
    assert torch.allclose(small(first, {"images": [second]}, gate=gate), expected, atol=1e-12)
    assert parameters(small) < parameters(net)


@dataclass
class Answer:
    logits: Tensor
    features: list[Tensor]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: {"out": a, "aux": {"deep": b}},
        lambda a, b: (a, [b, None]),
        lambda a, b: Answer(a, [b]),
    ],
    ids=["dictionary", "tuple_and_list", "dataclass"],
)
def test_every_tensor_that_leaves_the_network_keeps_its_channels(wrap):
    def run(m: nn.Module, x: Tensor) -> Any:
        x = m.stem(x)
        return wrap(m.head(x), m.side(x))

    found = cut(
        Net(run, stem=conv(3, 8), head=conv(8, 2), side=conv(8, 5)).double(), torch.randn(IMAGE).double()
    )
    assert found.graph.pinned[found.graph.layers["head.weight"][0]] == OUTPUT
    assert found.graph.pinned[found.graph.layers["side.weight"][0]] == OUTPUT
    assert len(found.graph.prunable) == 8
    assert len(found.remove) == 4
    assert found.dead < 1e-12


def test_a_branch_on_a_value_follows_the_way_that_the_example_takes_and_says_so():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(m.stem(x))
        x = m.a(x) if x.sum() > 1e9 else m.b(x)
        return m.head(F.relu(x))

    net = Net(
        run, stem=conv(3, 8), norm=nn.BatchNorm2d(8), a=conv(8, 6), b=conv(8, 6), head=conv(6, 2)
    ).double()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    found = cut(net, torch.randn(IMAGE).double())
    assert any("branches" in note for note in found.graph.notes)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert "b.weight" in found.graph.layers
    assert "a.weight" not in found.graph.layers
    assert len(found.remove) == 7
    assert found.dead < 1e-12


class Auxiliary(nn.Module):
    """A second head that exists only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 6), conv(6, 2)
        self.side, self.side_head = conv(8, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        out = self.head(F.relu(self.body(x)))
        return (out, self.side_head(F.relu(self.side(x)))) if self.training else out


def test_an_auxiliary_head_that_exists_in_train_mode_only_is_cut_too():
    x = torch.randn(IMAGE).double()
    found = cut(Auxiliary().double(), x, share=0.6)
    assert len(found.graph.prunable) == 8 + 6 + 5
    assert found.dead < 1e-12
    dead = with_dead_filters(found.dense, found.graph, found.remove)
    for want, have in zip(dead.train()(x), found.model.train()(x), strict=True):
        assert torch.allclose(want, have, atol=1e-12)
    assert found.model.side.out_channels < 5


def test_macs_are_those_of_an_eval_forward_without_the_auxiliary_head():
    x = torch.randn(IMAGE)
    net = Auxiliary()
    assert trace(net, x).cost("macs") == counted_macs(net, x)
    assert trace(net, x).cost("params") == parameters(net)


def test_a_norm_after_global_pooling_can_be_traced_with_a_batch_of_one():
    net = nn.Sequential(
        conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    ).double()
    found = cut(net, torch.randn(1, 3, 8, 8).double())
    assert not found.graph.notes
    assert len(found.graph.prunable) == 8
    assert found.dead < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_a_network_that_can_run_in_one_mode_only_is_traced_in_that_and_says_so(training):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        if m.training != training:
            raise RuntimeError("not in this mode, please")
        return m.head(F.relu(m.stem(x)))

    graph = trace(Net(run, stem=conv(3, 8), head=conv(8, 2)), torch.zeros(IMAGE))
    assert len(graph.prunable) == 8
    assert graph.notes == [f"{'eval' if training else 'train'} mode cannot be run: not in this mode, please"]


def test_a_binary_head_of_one_output_is_not_taken_for_depthwise():
    found = cut(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 1)).double(), torch.randn(IMAGE).double())
    assert found.graph.pinned[found.graph.layers["2.weight"][0]] == OUTPUT
    assert len(found.graph.prunable) == 8
    assert len(found.remove) == 4
    assert found.dead < 1e-12
    assert found.zeroed < 1e-12


def test_a_first_layer_of_one_input_and_one_group_is_not_taken_for_depthwise():
    found = cut(nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 2)).double(), torch.randn(2, 1, 8, 8).double())
    assert len(found.graph.prunable) == 8
    assert found.dead < 1e-12


def test_tied_embedding_and_decoder_keep_one_table():
    def run(m: nn.Module, words: Tensor) -> Tensor:
        return F.linear(F.relu(m.mix(m.table(words))), m.table.weight)

    net = Net(run, table=nn.Embedding(20, 8), mix=nn.Linear(8, 8)).double()
    words = torch.randint(0, 20, (2, 5))
    found = cut(net, words)
    assert len(found.graph.prunable) == 8
    assert found.dead < 1e-12
    assert found.model.table.weight.shape == (20, 8 - len(found.remove))


def recurrent(kind: type[nn.Module]) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.cell(F.relu(m.embed(x)))[0])

    return Net(run, embed=nn.Linear(7, 8), cell=kind(8, 6, batch_first=True), head=nn.Linear(6, 2))


def test_a_weight_in_both_directions_says_so():
    net = Net(
        lambda m, x: m.head(F.relu(m.embed(x) @ m.w) @ m.w.t()),
        embed=nn.Linear(7, 8),
        w=nn.Parameter(torch.randn(8, 5)),
        head=nn.Linear(8, 2),
    )
    graph = trace(net, torch.zeros(TOKENS))
    assert any("w is a weight in both directions" in reason for reason in graph.pinned.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float32 is oneDNN's on the CPU
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_hidden_units_of_a_recurrent_layer_go_with_all_their_gates(kind, dtype):
    found = cut(recurrent(kind).to(dtype), torch.randn(TOKENS).to(dtype))
    assert len(found.graph.prunable) == 8 + 6
    assert len(found.remove) == 7
    assert found.dead < (1e-12 if dtype is torch.float64 else 1e-5)
    hidden = found.model.head.in_features
    assert hidden < 6
    assert found.model.cell.hidden_size == hidden
    assert found.model.cell.weight_hh_l0.shape == (hidden * (4 if kind is nn.LSTM else 3), hidden)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_projection_of_an_lstm_shrinks_and_its_state_stays(share):
    net = Net(
        lambda m, x: m.head(m.cell(F.relu(m.embed(x)))[0]),
        embed=nn.Linear(7, 8), cell=nn.LSTM(8, 6, proj_size=4, batch_first=True), head=nn.Linear(4, 2),
    )  # fmt: skip
    found = cut(net.double(), torch.randn(TOKENS).double(), share=share)
    assert len(found.graph.prunable) == 8 + 4
    stuck = {found.graph.pinned[unit] for unit in found.graph.layers["cell.weight_ih_l0"]}
    assert stuck == {"is the state of an LSTM, which torch wants wider than its projection"}
    assert max(found.dead, found.zeroed) < 1e-12
    assert found.model.cell.hidden_size == 6 > found.model.cell.proj_size == found.model.head.in_features


def test_two_layers_in_both_directions_are_cut_together():
    cell = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
    net = Net(
        lambda m, x: m.head(m.cell(F.relu(m.embed(x)))[0]),
        embed=nn.Linear(7, 8),
        cell=cell,
        head=nn.Linear(12, 2),
    )
    found = cut(net.double(), torch.randn(TOKENS).double())
    assert len(found.graph.prunable) == 8 + 6
    assert max(found.dead, found.zeroed) < 1e-12


PINNING = {
    "cumulative sum": (lambda x: x.cumsum(1), r"picked or ordered by values \(aten::cumsum, test_rules"),
    "sorting": (lambda x: x.sort(1).values, r"picked or ordered by values \(aten::sort"),
    "pooling over channels": (
        lambda x: F.max_pool1d(x.flatten(2).transpose(1, 2), 2).transpose(1, 2).view(2, 4, 8, 8),
        "is pooled or resampled along its channels",
    ),
    "a convolution along channels": (
        lambda x: F.conv1d(x.mean((2, 3))[:, None], torch.ones(1, 1, 3).double(), padding=1)[
            :, 0, :, None, None
        ],
        "is convolved along its channels",
    ),
    "a matrix product with a constant": (
        lambda x: torch.einsum("bchw,dc->bdhw", x, torch.eye(8).double()),
        "reads an input whose channels are fixed|meets a dimension of fixed size",
    ),
    "a constant per channel": (
        lambda x: x * torch.arange(8.0).double()[:, None, None],
        r"meets a tensor of fixed size \(aten::mul",
    ),
    "half of them by a plain number": (
        lambda x: torch.roll(x[:, : int(x.shape[1]) // 2], 1, 3),
        r"made plain by int\(\)|is sliced at a number in the code",
    ),
    "their number sizes other channels": (
        lambda x: (
            torch.ones(2, 2, 4, 8, 8).double().view(2, 2, x.shape[1] // 2, 8, 8).flatten(1, 2) * x.mean()
        ),
        r"its number sizes a reshape of other channels \(aten::view, test_rules",
    ),
    "a turn of channels into rows": (
        lambda x: torch.rot90(x, 1, (1, 2)),
        r"turned together with another dimension \(aten::rot90",
    ),
    "circular padding of channels": (
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), mode="circular"),
        r"padded along its channels \(aten::pad",
    ),
    "unequal parts": (
        lambda x: torch.cat(torch.tensor_split(x, 3, 1), 1),
        r"split into unequal parts .* \(aten::tensor_split",
    ),
    "parts at numbers": (
        lambda x: torch.cat(torch.tensor_split(x, (2, 4, 6), 1), 1),
        r"sliced at (a number|numbers) in the code",
    ),
    "a Fourier transform": (lambda x: torch.fft.rfft2(x).abs(), r"without a rule \(aten::_fft_r2c"),
}


@pytest.mark.parametrize("name", PINNING)
def test_what_cannot_shrink_is_pinned_with_the_operator_that_says_so(name):
    function, reason = PINNING[name]
    x = torch.randn(2, 3, 8, 8).double()
    width = function(torch.zeros(2, 8, 8, 8).double()).shape[1]
    graph = trace(images(lambda m, x: function(x), width)().double(), x)
    reasons = {graph.pinned.get(unit, "free") for unit in graph.layers["stem.weight"].tolist()}
    assert all(re.search(reason, found) for found in reasons), reasons
    assert list(graph.unsupported) == (["aten::_fft_r2c"] if "_fft_r2c" in reason else [])
