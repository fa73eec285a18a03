"""Tests that a trace leaves the model, its modes and the random state unchanged."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.testing import randomise_
from tests.support.nets import Net, Small, assert_same, independent_units, state

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> nn.Module:
    return randomise_(Small())


@pytest.mark.parametrize("training", [True, False])
def test_a_trace_does_not_change_the_model(training):
    net = nn.Sequential(Small(), nn.Dropout(0.5))
    net.train(training)
    net[0].norm.eval()
    net[0].widths = [1, (2, 3)]
    net(X)
    before, python = state(net), random.getstate()
    trace(net, X)
    assert_same(state(net), before)
    assert random.getstate() == python
    assert type(net[0].stem.groups) is int
    assert net[0].norm.training is False


def test_a_trace_that_must_compute_values_does_not_change_the_model():
    net = Net(
        lambda m, x: m.head(m.norm(m.stem(x)).relu() if x.sum() > 0 else m.stem(x)),
        stem=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8), head=nn.Conv2d(8, 2, 1),
    ).train()  # fmt: skip
    net(X)
    before, inputs = state(net), X.clone()
    graph = trace(net, X)
    assert any("values" in note for note in graph.notes)
    assert_same(state(net), before)
    assert torch.equal(X, inputs)


def test_a_trace_that_fails_does_not_change_the_model(model):
    model.hidden = nn.Linear(41, 7)
    model.train()
    model.norm.eval()
    before = state(model)
    with pytest.raises(RuntimeError, match="41"):
        trace(model, X)
    assert_same(state(model), before)


def test_no_unit_of_a_trace_depends_on_the_values_or_the_mode_of_the_model(model):
    first = trace(model.train(), X)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    second = trace(model.eval(), X * 0)
    assert_same(
        {n: u.tolist() for n, u in second.layers.items()}, {n: u.tolist() for n, u in first.layers.items()}
    )
    assert independent_units(second).tolist() == independent_units(first).tolist()


class Masked(nn.Module):
    """Mask random positions in training, chosen by numpy, as the speech models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        if self.training:
            keep = np.random.rand(x.shape[1]) > 0.5  # noqa: NPY002
            x = x * torch.tensor(keep, dtype=x.dtype)[:, None]
        return self.last(x)


def test_random_numbers_of_numpy_are_the_same_in_each_trace_and_its_state_stays():
    np.random.seed(7)  # noqa: NPY002
    net, before = Masked(), np.random.get_state()[1].tolist()  # noqa: NPY002
    graph = trace(net, torch.randn(1, 50, 3))
    prune_(net, graph, graph.layers["first.weight"][:3])
    assert net.first.out_features == 5
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


class Skipped(nn.Module):
    """Skip layers at random in training, after a dropout whose numbers depend on the width (LayerDrop)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = self.drop(x)
            if not self.training or torch.rand([]) < 0.5:
                x = x + layer(x).relu()
        return self.last(x)


def test_layers_that_are_skipped_at_random_are_the_same_ones_after_a_cut():
    net = Skipped()
    graph = trace(net, torch.randn(1, 5, 3))
    prune_(net, graph, graph.layers["first.weight"][:3])
    assert net.first.out_features == 5
