"""Tests of Taylor on the outputs: against exact gradients, and that observing leaves no traces."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import trace
from lightning_prune.criteria import OutputGradients, OutputTaylor, TaylorGate
from lightning_prune.testing import randomise_
from tests.support.nets import Small, assert_same, state


def perceptron(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))


def gradients_at_gates(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the gradients of all outputs of all samples at gates on the first layer, shape (n, outputs, gates)."""
    return torch.stack([_jacobian(net, sample) for sample in x])


def _jacobian(net: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(lambda z: net[2](net[1](net[0](sample) * z)), torch.ones(3))


def test_one_output_of_one_sample_gives_exact_squared_gradients():
    net, x = perceptron(), torch.randn(3, 1, 2)
    with OutputGradientsOf(net, x[0], projections=2) as observer:
        for sample in x:
            net(sample)
    expected = 2 * torch.stack([gradients_at_gates(net, sample)[0, 0].square() for sample in x]).mean(0)
    np.testing.assert_allclose(observer.compute()["0.weight"], expected, rtol=1e-5)


def test_random_signs_estimate_the_sum_over_outputs_and_samples():
    net, x = perceptron(5), torch.randn(8, 2)
    with OutputGradientsOf(net, x, projections=4000) as observer:
        net(x)
    expected = gradients_at_gates(net, x).square().sum((0, 1))
    np.testing.assert_allclose(observer.compute()["0.weight"] / 4000, expected, rtol=0.1)


def test_scores_do_not_vanish_with_the_gradients_of_the_loss():
    """Outputs equal to the targets: Taylor of the loss is 0 for all units."""
    net, x = perceptron(2), torch.randn(8, 2)
    graph, target = trace(net, x), net(x).detach()
    loss_observer = TaylorGate().observer(graph, net)
    F.mse_loss(net(x), target).backward()
    loss_observer.on_step(net.parameters())
    units = graph.layers["0.weight"]
    assert not TaylorGate()(graph, net, loss_observer.compute())[units].any()
    with OutputGradientsOf(net, x) as observer:
        net(x)
    assert (OutputTaylor()(graph, net, observer.compute())[units] > 0).all()


@pytest.mark.parametrize("mode", ["no_grad", "train", "frozen"])
def test_observing_leaves_no_traces(mode):
    net = randomise_(Small()).train(mode == "train")
    net.requires_grad_(mode != "frozen")
    reference, x = copy.deepcopy(net), torch.randn(2, 3, 8, 8)
    observer = OutputTaylor().observer(trace(net, x), net)
    before = state(reference)
    with torch.set_grad_enabled(mode == "train"):
        expected = reference(x)
        after = state(reference)
        observer.attach()
        actual = net(x)
        observer.detach()
    assert torch.equal(actual, expected)
    seen = state(net)
    for key in ("values", "grads", "needs", "modes", "hooks"):
        assert_same(seen[key], after[key], key)
    assert_same(before["random"], seen["random"])
    assert all((values > 0).any() for values in observer.compute().values())


def test_hooks_record_the_forward_itself_only():
    """As for distillation by features, whose backward follows."""
    net, x, features = perceptron(), torch.randn(4, 2), []
    with OutputGradientsOf(net, x):
        net[1].register_forward_hook(lambda module, args, out: features.append(out))
        output = net(x)
    assert torch.equal(net[2](*features), output)
    features[0].sum().backward()
    net(x)
    assert len(features) == 2


def test_only_the_first_batches_are_observed_and_a_checkpoint_continues_bit_for_bit():
    net, x = perceptron(2), torch.randn(4, 8, 2)
    graph, whole = trace(net, x[0]), OutputGradients(trace(net, x[0]), net, batches=3)
    whole.attach()
    net(x[0])
    saved = copy.deepcopy(whole.state())
    resumed = OutputGradients(graph, net, batches=3)
    resumed.load(saved)
    resumed.attach()
    for batch in x[1:]:
        net(batch)
    assert whole.observed == 3
    assert all(np.array_equal(values, resumed.compute()[name]) for name, values in whole.compute().items())


def test_no_batch_and_bad_arguments_are_refused():
    net = perceptron()
    graph = trace(net, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="did any batch run"):
        OutputTaylor()(graph, net, OutputTaylor().observer(graph, net).compute())
    with pytest.raises(ValueError, match="at least 1"):
        OutputTaylor(projections=0)


class OutputGradientsOf(OutputGradients):
    """Observer that is attached within a context."""

    def __init__(self, net: nn.Module, x: torch.Tensor, projections: int = 4) -> None:
        super().__init__(trace(net, x), net, projections)

    def __enter__(self) -> OutputGradientsOf:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
