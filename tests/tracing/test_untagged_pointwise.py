"""Activations are followed whether or not torch tags them as pointwise: torch 2.11 leaves some of them out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from lightning_prune.tracing.rules.registry import RULES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": F.leaky_relu,
    "leaky_relu_": lambda x: F.leaky_relu(x, inplace=True),
    "elu_": lambda x: F.elu(x, inplace=True),
    "celu_": lambda x: F.celu(x, inplace=True),
    "selu_": lambda x: F.selu(x, inplace=True),
    "hardsigmoid_": lambda x: F.hardsigmoid(x, inplace=True),
    "hardtanh_": lambda x: F.relu6(x, inplace=True),
}


class Activated(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_a_rule_of_their_own_and_are_cut(name: str) -> None:
    assert RULES[getattr(torch.ops.aten, name).default].__name__ == "pointwise"
    net = Activated(ACTIVATIONS[name])
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    assert len(graph.prunable) == 8
    prune_(net, graph, graph.prunable[:4])
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 6, 6)
