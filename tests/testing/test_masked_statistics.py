"""The oracle of norms across channels: right for every kind of norm, and wrong where the cut is wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.testing import error, randomise_, with_dead_filters, with_masked_statistics


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Standardised(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


class Shares(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.softmax(-1)


class Largest(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.amax()


class Plus(nn.LayerNorm):
    """A layer norm whose scale is stored without its one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias)


class Standard(nn.Linear):
    """A layer whose rows of weights are standardised."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.batch_norm(self.weight[None], None, None, training=True)
        return nn.functional.linear(x, rows[0], self.bias)


NORMS = {
    "standardised weights": Standard(8, 6),
    "layer norm with another one": Plus(8),
    "layer norm": nn.LayerNorm(8),
    "layer norm without scale": nn.LayerNorm(8, elementwise_affine=False),
    "rms norm": nn.RMSNorm(8),
    "rms norm by hand": RMS(8),
    "standardised by hand": Standardised(),
    "softmax": Shares(),
    "largest of all": Largest(),
    "group norm": nn.GroupNorm(2, 8),
    "group norm without scale": nn.GroupNorm(2, 8, affine=False),
}


def network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(
        nn.Sequential(nn.Linear(3, 8), copy.deepcopy(norm), nn.Linear(getattr(norm, "out_features", 8), 5))
    ).double()


@pytest.mark.parametrize("name", NORMS)
def test_oracle_equals_the_network_after_a_cut(name: str):
    dense, x = network(NORMS[name]), torch.randn(4, 3).double()
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    assert set(graph.layers["0.weight"].tolist()) <= set(graph.statistics_units.tolist())
    remove = np.unique(graph.layers["0.weight"][[1, 4]])
    prune_(pruned, graph, remove)
    assert error(with_masked_statistics(dense, graph, remove), pruned, x) < 1e-12
    assert error(dense, pruned, x) > 1e-2
    assert error(with_dead_filters(dense, graph, remove), pruned, x) > 1e-2


class Shifted(nn.Module):
    """A norm of channels to all of which the same positions are added."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.norm = nn.Parameter(torch.randn(4, 1)), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.positions)


def test_equal_channels_can_be_left_out_too():
    dense, x = network(Shifted()), torch.randn(4, 3).double()
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    prune_(pruned, graph, [1, 4])
    assert error(with_masked_statistics(dense, graph, [1, 4]), pruned, x) > 1e-2
    assert error(with_masked_statistics(dense, graph, [1, 4], leave_out_equal=True), pruned, x) < 1e-12


def test_oracle_differs_from_a_wrong_cut():
    dense, x = network(nn.LayerNorm(8)), torch.randn(4, 3).double()
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    prune_(pruned, graph, [1, 4])
    with torch.no_grad():
        pruned[2].weight.copy_(pruned[2].weight.flip(1))
    assert error(with_masked_statistics(dense, graph, [1, 4]), pruned, x) > 1e-2


def test_units_after_an_activation_that_is_not_zero_at_zero_are_judged_right():
    torch.manual_seed(0)
    dense = randomise_(nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 5))).double()
    pruned, x = copy.deepcopy(dense), torch.randn(4, 3).double()
    graph = trace(pruned, x)
    prune_(pruned, graph, [1, 4])
    assert error(with_masked_statistics(dense, graph, [1, 4]), pruned, x) < 1e-12
    assert error(with_dead_filters(dense, graph, [1, 4]), pruned, x) > 1e-2


def test_attention_of_torch_runs_without_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    dense = randomise_(nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 5))).double().eval()
    pruned, x = copy.deepcopy(dense), torch.randn(2, 6, 3).double()
    graph = trace(pruned, x)
    hidden = graph.layers["1.linear1.weight"][[0, 3]]
    prune_(pruned, graph, hidden)
    assert error(with_masked_statistics(dense, graph, hidden), pruned, x) < 1e-12
    assert torch.backends.mha.get_fastpath_enabled()
