"""Sizes do not pass from a trace into caches, nor from caches into a trace (einops, ``functools.lru_cache``)."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import sys
import weakref
from types import ModuleType

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import nn

from lightning_prune import PruningRecord, prune_, trace
from lightning_prune.testing import with_zeroed_consumers
from lightning_prune.tracing.traced_int import TracedInt


class Functional(nn.Module):
    """Attention by the functions of einops."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.o = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in self.qkv(x).chunk(3, -1))
        return self.o(rearrange((q @ k.transpose(-2, -1)).softmax(-1) @ v, "b h n d -> b n (h d)"))


class Layers(nn.Module):
    """Attention by the layers of einops, which keep the number of heads."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.split, self.merge = Rearrange("b n (h d) -> b h n d", h=heads), Rearrange("b h n d -> b n (h d)")

    def forward(self, x):
        q, k, v = (self.split(t) for t in self.qkv(x).chunk(3, -1))
        return self.o(self.merge((q @ k.transpose(-2, -1)).softmax(-1) @ v))


def _network(block):
    return nn.Sequential(nn.Linear(5, 16), block(), block(), nn.Linear(16, 3)).eval()


@functools.lru_cache
def _merged(channels, pixels):
    return channels * pixels


class Cached(nn.Module):
    """A flattening by a cached helper."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width * 4, 2)

    def forward(self, x):
        y = self.conv(x)
        return self.out(y.reshape(len(x), _merged(y.shape[1], y.shape[2] * y.shape[3])))


@pytest.mark.parametrize("block", [Functional, Layers])
def test_same_graph_before_and_after_a_forward_and_in_the_second_trace(block):
    net, x = _network(block), torch.randn(2, 9, 5)
    graphs = [trace(net, x)]
    net(x)
    graphs += [trace(net, x), trace(copy.deepcopy(net), x)]
    first = graphs[0]
    assert (
        len(first.prunable) == 16 + 2 * 8 + 2 * 16 - 8
    )  # the width, heads of two blocks, and nothing of the output
    for graph in graphs[1:]:
        assert graph.pinned == first.pinned
        assert {n: u.tolist() for n, u in graph.layers.items()} == {
            n: u.tolist() for n, u in first.layers.items()
        }


@pytest.mark.parametrize("block", [Functional, Layers])
def test_heads_are_removed_as_without_einops(block):
    net, x = _network(block), torch.randn(2, 9, 5)
    net(x)
    graph = trace(net, x)
    units = [graph.layers["1.qkv.weight"][0], graph.layers["2.qkv.weight"][-1]]
    dense, fresh = with_zeroed_consumers(copy.deepcopy(net), graph, units), copy.deepcopy(net)
    record = prune_(net, graph, units)
    torch.testing.assert_close(net(x), dense(x))
    again = PruningRecord.from_dict(record.to_dict()).apply_(fresh)
    for copied in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(copied(x), net(x), rtol=0, atol=0)


def test_layer_of_einops_shows_its_new_number_of_heads():
    net = _network(Layers)
    graph = trace(net, torch.randn(2, 9, 5))
    record = prune_(net, graph, graph.layers["1.qkv.weight"][:1])
    assert repr(net[1].split) == "Rearrange('b n (h d) -> b h n d', h=3)"
    assert record.attributes["1.split._axes_lengths[h]"] == 3


def test_layers_of_einops_that_reduce_keep_channels_free():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Rearrange("b c h w -> b (h w) c"), Reduce("b n c -> b c", "mean"))
    net = nn.Sequential(*net, nn.Linear(8, 2)).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    units = graph.layers["0.weight"][2:5]
    dense = with_zeroed_consumers(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    torch.testing.assert_close(net(x), dense(x))


def test_cached_helper_is_called_without_its_cache_and_keeps_no_traced_size():
    net, x = Cached(), torch.randn(1, 3, 2, 2)
    _merged.cache_clear()
    net(x)
    cached = _merged
    graphs = [trace(net, x), trace(Cached(), x)]
    assert _merged is cached
    assert [len(graph.prunable) for graph in graphs] == [6, 6]
    assert type(_merged(6, 4)) is int
    assert not isinstance(_merged(6, 4), TracedInt)
    prune_(net, graphs[0], graphs[0].layers["conv.weight"][:2])
    assert net(x).shape == (1, 2)
    assert net.out.in_features == 16


def _cached_by_a_decorator(function):
    """Cache a function inside of another one, as Transformers does."""
    cached = functools.lru_cache(function)

    @functools.wraps(function)
    def call(*args):
        return cached(*args)

    return call


class Biased(nn.Module):
    """Add a table's entries at positions that a cached function computes from plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.out = nn.Linear(3, 8), nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 2)

    @staticmethod
    @_cached_by_a_decorator
    def inside(n):
        return torch.arange(n).flip(0)

    @staticmethod
    @functools.lru_cache
    def static(n):
        return torch.arange(n).flip(0)

    @classmethod
    @functools.lru_cache
    def of_class(cls, n):
        return torch.arange(n).flip(0)

    def forward(self, x):
        return self.out(
            self.first(x) + sum(self.table[f(5)] for f in (self.inside, self.static, self.of_class))
        )


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a forward"])
def test_tensors_of_a_trace_do_not_stay_in_caches_and_are_made_in_every_trace(before):
    for function in (Biased.inside.__closure__[0].cell_contents, Biased.static, Biased.of_class):
        function.cache_clear()
    net, x = Biased(), torch.randn(1, 5, 3)
    if before:
        net(x)
    graph = trace(net, x)
    units = graph.layers["first.weight"][[1, 4]]
    dense = with_zeroed_consumers(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    assert net.first.out_features == 6
    torch.testing.assert_close(net(x), dense(x))
    assert Biased.static.cache_info().hits + Biased.static.cache_info().misses > 0  # the cache is back


class Halving(nn.Module):
    """It caches a method by instance, so that the cache refers to the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.half = functools.lru_cache(self.half_of)

    def half_of(self, n):
        return n // 2

    def forward(self, x):
        h = self.first(x)
        return self.out(h.view(len(h), 2, self.half(h.shape[1])).flatten(1))


def test_a_trace_does_not_keep_a_network_alive():
    net = Halving()
    assert len(trace(net, torch.randn(1, 3)).prunable) == 4
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


def test_a_class_that_is_defined_anew_is_found_in_a_module_of_as_many_names(monkeypatch):
    file = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", file)
    for _ in range(2):  # as a notebook whose cell runs again
        members = {name: vars(Biased)[name] for name in ("__init__", "forward", "inside", "of_class")}
        cached = functools.lru_cache(lambda n: torch.arange(n).flip(0))
        file.Net = type(
            "Net", (Biased,), {**members, "__module__": "notebook", "static": staticmethod(cached)}
        )
        graph = trace(file.Net(), torch.randn(1, 5, 3))
        assert len(graph.prunable) == 8
        assert not file.Net.static(5).is_meta  # nothing of the trace is in the cache
