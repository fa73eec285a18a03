"""``c // heads`` with ``c`` from the input: the embedding shrinks in multiples of the heads (DeiT, DINO, PVT)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

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
