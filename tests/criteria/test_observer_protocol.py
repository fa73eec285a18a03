"""Tests of what is observed for plain functions, for FunctionCriterion, and for classes with an observer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.robustness.kill_run import Classifier, fit, pruning, shuffled
from lightning_prune import ChannelGraph, trace
from lightning_prune.criteria import L2, Collector, MeanActivation, per_unit
from lightning_prune.criteria.base import Criterion, FunctionCriterion, as_criterion

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met)")

IMAGE = torch.zeros(1, 1, 12, 12)


class HookCounter(L.Callback):
    """Counts the forward hooks of the layers in each training batch."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Classifier, *_: Any) -> None:
        self.numbers.append(sum(len(layer._forward_hooks) for layer in pl_module.net.modules()))


def fit_with(criterion: Callable[..., Any]) -> list[int]:
    """Train with cuts at the ends of epochs 1 and 2 and return the number of hooks in each batch."""
    counter, callback = HookCounter(), pruning(criterion=criterion, amount={"macs": 0.2})
    fit(Classifier(), shuffled(), [counter, callback], None, max_epochs=3)
    assert [cut.epoch for cut in callback.history] == [1, 2]
    return counter.numbers


def mean_activation_observer(graph: ChannelGraph, model: nn.Module) -> Collector:
    return Collector(graph, model, MeanActivation)


class MeanActivationCriterion:
    """A criterion that inherits from no class of the package."""

    def __init__(self) -> None:
        self.statistics: list[dict[str, np.ndarray]] = []

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Collector:
        return mean_activation_observer(graph, model)

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Any) -> np.ndarray:
        self.statistics.append(dict(statistics))
        return per_unit(graph, statistics)


def test_a_plain_function_receives_no_statistics_and_registers_no_hooks() -> None:
    received: list[dict[str, np.ndarray]] = []

    def norms(graph: ChannelGraph, model: nn.Module, statistics: Any) -> np.ndarray:
        received.append(dict(statistics))
        return L2()(graph, model)

    assert set(fit_with(norms)) == {0}
    assert received
    assert all(statistics == {} for statistics in received)


def test_a_plain_function_is_wrapped_without_an_observer() -> None:
    net = Classifier().net
    graph = trace(net, IMAGE)
    criterion = as_criterion(lambda graph, model, statistics: np.ones(graph.num_units))
    assert isinstance(criterion, FunctionCriterion)
    assert isinstance(criterion, Criterion)
    assert criterion.observer(graph, net) is None
    assert criterion(graph, net, {}).tolist() == [1.0] * graph.num_units


def test_a_function_criterion_with_an_observer_receives_its_statistics_in_training() -> None:
    received: list[dict[str, np.ndarray]] = []

    def mean_activation(graph: ChannelGraph, model: nn.Module, statistics: Any) -> np.ndarray:
        received.append(dict(statistics))
        return per_unit(graph, statistics)

    hooks = fit_with(FunctionCriterion(mean_activation, mean_activation_observer))
    assert hooks[0] == 0  # epoch 0 ends without a cut, so nothing is observed
    assert all(number > 0 for number in hooks[-5:])
    assert len(received) == 2
    for statistics in received:
        assert statistics.keys() == {"net.0.weight", "net.3.weight"}
        assert all((values > 0).all() for values in statistics.values())


def test_a_class_with_call_and_observer_is_used_as_a_criterion_itself() -> None:
    criterion = MeanActivationCriterion()
    assert isinstance(criterion, Criterion)
    assert as_criterion(criterion) is criterion
    fit_with(criterion)
    reference: list[dict[str, np.ndarray]] = []

    def mean_activation(graph: ChannelGraph, model: nn.Module, statistics: Any) -> np.ndarray:
        reference.append(dict(statistics))
        return per_unit(graph, statistics)

    fit_with(FunctionCriterion(mean_activation, mean_activation_observer))
    for statistics, expected in zip(criterion.statistics, reference, strict=True):
        assert statistics.keys() == expected.keys()
        assert all(np.array_equal(statistics[name], expected[name]) for name in expected)
