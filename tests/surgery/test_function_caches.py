"""A cut drops what cached functions and methods have computed of the network's modules."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import prune_, trace


class OwnMethod(nn.Module):
    """Keeps half of its width by a cached method, whose key is the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.z = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

    @functools.lru_cache  # noqa: B019
    def half(self) -> int:
        return self.a.out_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.z(y[:, : self.half()] * y[:, self.half() :])


@functools.cache
def _doubled(weight: Tensor) -> Tensor:
    return weight.detach() * 2


class OfParameter(nn.Module):
    """Scales its channels by a cached function of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.z, self.scale = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.a(x) * _doubled(self.scale)[:, None, None])


@pytest.mark.parametrize("by_record", [False, True])
@pytest.mark.parametrize("build", [OwnMethod, OfParameter])
def test_cut_drops_what_a_cached_function_has_computed(build, by_record):
    torch.manual_seed(0)
    net, fresh, x = build().eval(), build().eval(), torch.randn(1, 3, 4, 4)
    graph = trace(net, x)
    record = prune_(net, graph, graph.prunable[:2])
    if by_record:
        fresh(x)
        net = record.apply_(fresh)
    else:
        net = build().eval()
        net(x)
        graph = trace(net, x)
        prune_(net, graph, graph.prunable[:2])
    before = net(x)
    for cached in (OwnMethod.half, _doubled):
        cached.cache_clear()
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
