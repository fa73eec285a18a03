"""``c // heads`` with ``c`` from the input: the embedding shrinks in multiples of the heads (DeiT, DINO, PVT)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from lightning_prune import prune_, trace
from lightning_prune.testing import with_dead_filters


class Joint(nn.Module):
    """One layer for queries, keys and values, as in DeiT."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Separate(Joint):
    """Queries apart from keys and values, as in PVT."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x):
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(b, -1, 2, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Biased(Joint):
    """A learned bias for each head, as the relative positions of Swin and BEiT have: the heads stay."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.table = nn.Parameter(torch.randn(7, heads))
        self.register_buffer("index", torch.arange(49) % 7)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        scores = (qkv[0] * (c // self.num_heads) ** -0.5).matmul(qkv[1].transpose(-2, -1)) + bias
        return self.proj(scores.softmax(-1).matmul(qkv[2]).transpose(1, 2).reshape(b, n, c))


class CrossCovariance(Joint):
    """Channels of a head attend to each other, over unit vectors, with a temperature for each head, as in XCiT."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1))

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Residual(nn.Module):
    def __init__(self, attention) -> None:
        super().__init__()
        self.attention = attention()

    def forward(self, x):
        return x + self.attention(x)


@pytest.mark.parametrize("attention", [Joint, Separate])
@pytest.mark.parametrize("num_units", [1, 4])
def test_embedding_shrinks_in_multiples_of_the_heads(attention, num_units):
    net = nn.Sequential(nn.Linear(5, 24), Residual(attention), Residual(attention), nn.Linear(24, 3)).eval()
    x = torch.randn(2, 7, 5)
    graph = trace(net, x)
    units = list(dict.fromkeys(graph.layers["0.weight"].tolist()))
    assert len(units) == 24 // 4
    dense = with_dead_filters(copy.deepcopy(net), graph, units[:num_units])
    prune_(net, graph, units[:num_units])
    assert net[0].out_features == net[2].attention.proj.out_features == 24 - 4 * num_units
    assert net[1].attention.num_heads == 4
    torch.testing.assert_close(net(x), dense(x))


def by_hand(net: nn.Sequential, attention, heads: int) -> nn.Sequential:
    """Build a network of width 20 of one of 24, without channels 0 to 3 and the first channel of each head."""
    small = nn.Sequential(nn.Linear(5, 20), Residual(lambda: attention(20, heads)), nn.Linear(20, 3)).eval()
    embedding = torch.arange(heads, 24)
    within = torch.arange(24).view(heads, -1)[:, 1:].flatten()
    rows = torch.cat([within + 24 * part for part in range(3)])
    slices = {
        "0.weight": (embedding, None), "0.bias": (embedding,), "2.weight": (None, embedding),
        "1.attention.qkv.weight": (rows, embedding), "1.attention.qkv.bias": (rows,),
        "1.attention.proj.weight": (embedding, within), "1.attention.proj.bias": (embedding,),
    }  # fmt: skip
    state = net.state_dict()
    for name, indices in slices.items():
        for dim, index in enumerate(indices):
            state[name] = state[name] if index is None else state[name].index_select(dim, index)
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("attention", [Biased, CrossCovariance])
def test_parameters_of_each_head_leave_the_channels_within_heads_free(attention):
    net = nn.Sequential(nn.Linear(5, 24), Residual(attention), nn.Linear(24, 3)).eval()
    x = torch.randn(2, 7, 5)
    graph = trace(net, x)
    units = graph.layers["0.weight"]
    assert units[:4].tolist() == [units[0]] * 4
    assert len(set(units.tolist()) & set(graph.prunable.tolist())) == 6
    expected = by_hand(net, attention, heads=4)
    prune_(net, graph, units[:1])
    torch.testing.assert_close(net(x), expected(x))


@pytest.mark.parametrize("shift", [0, 1])
def test_embedding_of_three_dimensional_swin_is_free(shift):
    attention = ShiftedWindowAttention3d(24, [2, 2, 2], [shift] * 3, 3)
    net = nn.Sequential(nn.Linear(5, 24), Residual(lambda: attention), nn.Linear(24, 3)).eval()
    x = torch.randn(1, 4, 4, 4, 5)
    graph = trace(net, x)
    units = list(dict.fromkeys(graph.layers["0.weight"].tolist()))
    assert len(set(units) & set(graph.prunable.tolist())) == 8
    within = torch.arange(24).view(3, 8)[:, 1:].flatten()
    rows = torch.cat([within + 24 * part for part in range(3)])
    qkv, proj = attention.qkv.weight[rows][:, 3:].clone(), attention.proj.weight[3:][:, within].clone()
    prune_(net, graph, units[:1])
    assert torch.equal(attention.qkv.weight, qkv)
    assert torch.equal(attention.proj.weight, proj)
    small = ShiftedWindowAttention3d(21, [2, 2, 2], [shift] * 3, 3).eval()
    small.load_state_dict(attention.state_dict())
    y = torch.randn(1, 4, 4, 4, 21)
    torch.testing.assert_close(attention(y), small(y))


class ByAttributes(nn.Module):
    """Pass ``width // heads``, both attributes, for queries, keys and values, as CvT does with a single head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.width, self.heads = 12, heads
        self.q, self.k, self.v, self.proj = (
            nn.Linear(5, 12),
            nn.Linear(5, 12),
            nn.Linear(5, 12),
            nn.Linear(12, 2),
        )

    def forward(self, x):
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, self.width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        head = self.width // self.heads
        return self.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], self.heads * head))


@pytest.mark.parametrize("heads", [1, 3])
def test_widths_that_two_attributes_determine_together_shrink_together(heads):
    dense, x = ByAttributes(heads), torch.randn(2, 7, 5)
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    unit = graph.layers["v.weight"][:1]
    assert np.isin(unit, graph.layers["q.weight"]).all()
    prune_(pruned, graph, unit)
    assert pruned.q.out_features == pruned.v.out_features == (11 if heads == 1 else 9)
    torch.testing.assert_close(pruned(x), with_dead_filters(dense, graph, unit)(x))
