"""Convolutions, matrix products, einsum and attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from tests.support.nets import Attention, Net, counted_macs, cut
from tests.support.rule_cases import (
    IMAGE,
    OUTPUT,
    SIGNAL,
    TOKENS,
    VOLUME,
    Case,
    check_cut,
    check_pin_reason,
    check_same_channels,
    check_units,
    conv,
    images,
    parameter,
    tokens,
)


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


def grouped_queries(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x).view(2, 5, m.num_heads, m.head_dim)
    k = m.k(x).view(2, 5, m.num_kv_heads, m.head_dim)
    return m.o((q * k.repeat_interleave(m.num_heads // m.num_kv_heads, 2)).reshape(2, 5, -1))


CASES = {
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
    "attention_by_hand": Case(tokens(lambda m, x: x + m.attention(x), attention=Attention), 12 + 4, TOKENS),
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
    "non_local_block": Case(
        images(non_local, q=lambda: conv(8, 3), k=lambda: conv(8, 3), v=lambda: conv(8, 8)), 8 + 3,
        zeroed=False,
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
    "one_convolution_used_twice": Case(images(lambda m, x: m.a(F.relu(m.a(x))), a=lambda: conv(8, 8)), 8),
    "linear_by_a_transposed_parameter": Case(
        tokens(lambda m, x: F.relu(x @ m.w) @ m.w.t(), w=parameter(12, 5)), 5, TOKENS, zeroed=False,
        pinned={"embed.weight": "w is a weight in both directions"},
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
    "matrix_product_over_pixels": lambda x: x @ x.transpose(2, 3),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


PINNED = {
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
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])


@pytest.mark.parametrize("left", [8, 3, 1])
def test_einsum_costs_what_torch_counts_while_several_channels_remain(left):
    x = torch.randn(IMAGE).double()
    net = images(lambda m, x: torch.einsum("bchw,oc->bohw", x, m.w), 6, w=parameter(6, 8))().double()
    graph = trace(net, x)
    remove = graph.layers["stem.weight"][left:]
    prune_(net, graph, remove)
    after, positions = trace(net, x).cost("macs"), 2 * 8 * 8
    assert after == graph.cost("macs", remove)
    assert after - counted_macs(net, x) == (0 if left > 1 else positions * 6)


def test_head_with_one_output_is_not_depthwise():
    outcome = cut(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 1)).double(), torch.randn(IMAGE).double())
    assert outcome.graph.pinned[outcome.graph.layers["2.weight"][0]] == OUTPUT
    assert len(outcome.graph.prunable) == 8
    assert len(outcome.remove) == 4
    assert outcome.dead < 1e-12
    assert outcome.zeroed < 1e-12


def test_first_layer_with_one_input_is_not_depthwise():
    outcome = cut(nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 2)).double(), torch.randn(2, 1, 8, 8).double())
    assert len(outcome.graph.prunable) == 8
    assert outcome.dead < 1e-12


def test_weight_used_in_both_directions_is_pinned_with_this_reason():
    net = Net(
        lambda m, x: m.head(F.relu(m.embed(x) @ m.w) @ m.w.t()),
        embed=nn.Linear(7, 8),
        w=nn.Parameter(torch.randn(8, 5)),
        head=nn.Linear(8, 2),
    )
    graph = trace(net, torch.zeros(TOKENS))
    assert any("w is a weight in both directions" in reason for reason in graph.pinned.values())
