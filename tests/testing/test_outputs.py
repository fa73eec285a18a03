"""Errors of outputs whose number of results follows from values, and oracles of networks that cache values."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune import trace
from lightning_prune.testing import error, with_dead_filters
from tests.support.nets import Net


def test_outputs_without_elements_are_equal_if_their_shapes_are():
    first = Net(lambda net, x: (x, x[x > 9]))
    other = Net(lambda net, x: (x * 1.5, x[x > 9].reshape(0, 1)))
    x = torch.ones(2, 2)
    assert error(first, first, x) == 0.0
    assert error(first, other, x) == float("inf")


class Caching(nn.Module):
    """Caches what it computes of a scale: in the first forward in eval mode, and when it enters this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Parameter(torch.ones(4))
        self.kept = {}

    def train(self, mode: bool = True):
        self.kept = {} if mode else {"shift": self.scale.detach() - 1.0}
        return super().train(mode)

    def forward(self, x):
        if not self.training and "scale" not in self.kept:
            self.kept["scale"] = self.scale + 1.0
        scale = self.scale + 1.0 if self.training else self.kept["scale"]
        shift = self.kept.get("shift", self.scale - 1.0)
        return self.b(self.a(x) * scale[:, None, None] + shift[:, None, None])


def test_oracle_computes_anew_what_the_network_has_cached():
    net, x = Caching().eval().requires_grad_(False), torch.randn(1, 3, 4, 4)
    net(x)
    graph = trace(net, x)
    dead = with_dead_filters(net, graph, graph.layers["a.weight"][:2])
    dead(x)
    assert dead.kept["scale"].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert dead.kept["shift"].tolist() == [-1.0, -1.0, 0.0, 0.0]
    assert net.kept["scale"].tolist() == [2.0] * 4
