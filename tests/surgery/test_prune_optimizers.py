"""Tests of prune_ with optimizers: their state is cut, or reset with a warning, and training continues."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import prune_, trace
from lightning_prune.testing import randomise_
from tests.support.nets import Small, assert_same, random_units
from tests.support.surgery_steps import X, step

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.fixture
def model() -> nn.Module:
    return randomise_(Small())


@pytest.fixture
def graph(model):
    return trace(model, X)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_continues_like_one_whose_state_is_sliced_by_hand(model, name):
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    graph = trace(model, X)
    dense, saved = copy.deepcopy((model, optimizer.state_dict()))
    record = prune_(model, graph, random_units(graph), [optimizer])

    by_hand = record.apply_(dense)
    names = [name for name, _ in by_hand.named_parameters()]
    shapes = [record.shapes.get(n, list(p.shape)) for n, p in by_hand.named_parameters()]
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and list(value.shape) == shapes[index] and value.dim():
                for dim, kept in record.kept.get(names[index], {}).items():
                    value = value.index_select(dim, torch.tensor(kept))
                entries[key] = value
    other = OPTIMIZERS[name](by_hand.parameters())
    other.load_state_dict(saved)
    for p, entries in optimizer.state.items():
        assert all(v.shape in (p.shape, ()) for v in entries.values() if isinstance(v, Tensor))
    for _ in range(3):
        assert step(model, optimizer) == step(by_hand, other)
    assert_same(dict(model.state_dict()), dict(by_hand.state_dict()))


def test_two_optimizers_and_parameter_groups_are_cut(model):
    convolutions = [p for n, p in model.named_parameters() if "norm" not in n]
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    first = torch.optim.Adam([{"params": convolutions[:4], "lr": 0.1}, {"params": convolutions[4:]}])
    second = torch.optim.SGD(norms, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(first, 1, 0.5)
    step(model, first)
    second.step()
    graph = trace(model, X)
    prune_(model, graph, random_units(graph), [first, second])
    for optimizer in (first, second):
        assert optimizer.state
        assert all(v.shape in (p.shape, ()) for p, s in optimizer.state.items() for v in s.values())
    before = copy.deepcopy(dict(model.named_parameters()))
    step(model, first)
    second.step()
    schedule.step()
    assert [group["lr"] for group in first.param_groups] == [0.05, 0.0005]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.grad.any())


def test_state_that_cannot_be_cut_is_reset_with_a_warning(model, graph):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    optimizer.state[model.inner.weight]["factored"] = torch.zeros(6)
    with pytest.warns(UserWarning, match=r"SGD state of 'inner.weight' is reset: factored cannot be cut"):
        prune_(model, graph, graph.layers["inner.weight"][:2], [optimizer])
    assert model.inner.weight not in optimizer.state
    assert model.back.weight in optimizer.state
    step(model, optimizer)
    assert optimizer.state[model.inner.weight]["momentum_buffer"].shape == model.inner.weight.shape


def test_an_optimizer_that_has_not_stepped_yet_needs_nothing(model, graph):
    optimizer = torch.optim.Adam(model.parameters())
    prune_(model, graph, random_units(graph), [optimizer])
    first = step(model, optimizer)
    assert step(model, optimizer) < first
