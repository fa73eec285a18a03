"""Dynamic convolution: the kernels of each sample are a mixture, computed by a matrix product or an einsum."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import Limits, prune_, trace
from lightning_prune.selection.budget import reachable
from lightning_prune.testing import with_dead_filters


class DynamicConv(nn.Module):
    """Mix ``num_kernels`` kernels by attention, and convolve each sample with its own mixture."""

    def __init__(self, mix, into: int = 8, out: int = 12, size: int = 3, num_kernels: int = 4) -> None:
        super().__init__()
        self.mix, self.into, self.out, self.size, self.num_kernels = mix, into, out, size, num_kernels
        self.weight = nn.Parameter(torch.randn(num_kernels, out, into, size, size))
        self.attention = nn.Linear(into, num_kernels)

    def forward(self, x):
        b, _, h, w = x.shape
        attention = self.attention(x.mean((2, 3))).sigmoid()
        out = F.conv2d(x.reshape(1, -1, h, w), self.mix(self, attention), padding=self.size // 2, groups=b)
        return out.view(b, self.out, out.size(-2), out.size(-1))


def by_mm(net, attention):
    kernels = attention @ net.weight.view(net.num_kernels, -1)
    return kernels.view(attention.shape[0] * net.out, net.into, net.size, net.size)


def by_einsum(net, attention):
    return torch.einsum("bk,koihw->boihw", attention, net.weight).reshape(-1, net.into, net.size, net.size)


def by_sum(net, attention):
    return (attention[:, :, None, None, None, None] * net.weight).sum(1).flatten(0, 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mix", [by_mm, by_einsum, by_sum])
def test_mixed_kernels_lose_filters_and_inputs(mix, batch):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), DynamicConv(mix), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1)
    ).eval()  # fmt: skip
    x = torch.randn(batch, 3, 8, 8)
    graph = trace(net, x)
    filters = next(units for name, units in graph.layers.items() if name == "2.weight")
    units = np.concatenate([graph.layers["0.weight"][:3], filters[:5]])
    assert set(units.tolist()) <= set(graph.prunable.tolist())
    assert reachable(graph, limits=Limits(1.0, min_channels=1))["macs"] < 0.3 * graph.cost("macs")
    predicted = {resource: graph.cost(resource, units) for resource in ("macs", "params")}
    dense = with_dead_filters(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    assert net[2].weight.shape == (4, 7, 5, 3, 3)
    torch.testing.assert_close(net(x), dense(x), rtol=1e-4, atol=1e-5)
    assert {resource: trace(net, x).cost(resource) for resource in predicted} == predicted


def test_experts_stored_as_flat_rows_pin_the_inputs_and_lose_filters():
    """CondConv of timm: one number per row cannot be read off two dimensions, so one of them stays."""
    from timm.layers import CondConv2d

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.route = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
            self.mixed, self.b = CondConv2d(8, 12, 3, padding=1, num_experts=4), nn.Conv2d(12, 4, 1)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(self.mixed(y, self.route(y.mean((2, 3))).sigmoid()).relu())

    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    assert {graph.pinned[int(unit)] for unit in graph.layers["a.weight"]} == {
        "reads an input whose channels are fixed (aten::convolution in mixed, cond_conv2d.py:117)"
    }
    free = [unit for unit in graph.prunable.tolist() if unit not in graph.layers["route.weight"]]
    dense = with_dead_filters(copy.deepcopy(net), graph, free[:5])
    prune_(net, graph, free[:5])
    assert net.b.in_channels == 12 - 5
    torch.testing.assert_close(net(x), dense(x), rtol=1e-4, atol=1e-5)
