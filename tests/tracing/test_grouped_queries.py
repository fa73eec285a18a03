"""Grouped-query attention: a head of keys and values goes together with the query heads that read it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from lightning_prune.testing import with_zeroed_consumers


class GroupedQueries(nn.Module):
    """Attention of ``heads`` queries to ``kv`` keys, which ``repeat`` repeats, as Llama and its relatives do."""

    def __init__(self, repeat, dim: int = 32, heads: int = 4, kv: int = 2) -> None:
        super().__init__()
        self.head_dim, self.groups, self.repeat = dim // heads, heads // kv, repeat
        self.q, self.o = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k, self.v = (nn.Linear(dim, kv * self.head_dim) for _ in "kv")

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.o(self.attend(q, k, v).transpose(1, 2).reshape(b, n, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ self.repeat(self, k).transpose(2, 3) / self.head_dim**0.5
        return scores.softmax(-1) @ self.repeat(self, v)


class Fused(GroupedQueries):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class SplitQueries(GroupedQueries):
    """The queries are split by the number of heads of the keys, instead of repeating these."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, n, width = q.shape
        q = q.view(b, k.shape[1], self.groups, n, width)
        weights = (q @ k[:, :, None].transpose(-1, -2)).softmax(-1)
        return (weights @ v[:, :, None]).reshape(b, -1, n, width)


def by_expand(net: GroupedQueries, t: Tensor) -> Tensor:
    b, h, n, d = t.shape
    return t[:, :, None].expand(b, h, net.groups, n, d).reshape(b, h * net.groups, n, d)


def by_repeat(net: GroupedQueries, t: Tensor) -> Tensor:
    b, h, n, d = t.shape
    return t.unsqueeze(2).repeat(1, 1, net.groups, 1, 1).view(b, h * net.groups, n, d)


CASES = {
    "expand": lambda kv: GroupedQueries(by_expand, kv=kv),
    "repeat": lambda kv: GroupedQueries(by_repeat, kv=kv),
    "repeat_interleave": lambda kv: GroupedQueries(lambda net, t: t.repeat_interleave(net.groups, 1), kv=kv),
    "stack": lambda kv: GroupedQueries(lambda net, t: torch.stack([t] * net.groups, 2).flatten(1, 2), kv=kv),
    "fused": lambda kv: Fused(None, kv=kv),
    "split queries": lambda kv: SplitQueries(None, kv=kv),
}


def _cut_first_query_head(case: str, kv: int) -> tuple[nn.Module, nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(8, 32), CASES[case](kv), nn.Linear(32, 5)).eval()
    x = torch.randn(2, 9, 8)
    graph = trace(net, x)
    units = graph.layers["1.q.weight"][:1]
    dense = with_zeroed_consumers(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    return net, dense, x


@pytest.mark.parametrize("kv", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_heads_go_in_groups_with_their_keys(case, kv):
    net, dense, x = _cut_first_query_head(case, kv)
    assert net[1].q.out_features == 32 - 8 * 4 // kv
    assert net[1].k.out_features == net[1].v.out_features == 8 * (kv - 1)
    torch.testing.assert_close(net(x), dense(x))


@pytest.mark.parametrize("case", ["expand", "repeat", "fused"])
def test_single_key_head_leaves_the_query_heads_free(case):
    net, dense, x = _cut_first_query_head(case, kv=1)
    assert (net[1].q.out_features, net[1].k.out_features) == (24, 8)
    torch.testing.assert_close(net(x), dense(x))
