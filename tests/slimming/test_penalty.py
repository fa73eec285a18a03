"""Tests that the added gradient equals that of a penalty term in the loss, under the options of a trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from segmentation_models_pytorch import Unet

from lightning_prune import SlimmingCallback, trace
from lightning_prune.graph.layer_costs import LayerCost
from lightning_prune.slimming.penalty import Penalty, channel_costs, slimmable
from tests.support.slimming_runs import QUIET, Small, fit, sgd, slimming, small_net

pytestmark = QUIET


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=str,
)
def test_the_penalty_equals_autograd_s_gradient_of_a_loss_term(options: dict[str, Any]) -> None:
    """The weights after training are equal too: gradients are accumulated, clipped and stepped alike."""
    with_loss_term, with_callback, plain = (Small(rho, sgd(0.1)) for rho in (0.03, 0.0, 0.0))
    fit(with_loss_term, **options)
    fit(with_callback, slimming(rho=0.03, end_epoch=9), **options)
    assert (
        len(with_loss_term.grads)
        == len(with_callback.grads)
        == 8 // options.get("accumulate_grad_batches", 1)
    )
    for callback_grad, loss_term_grad in zip(with_callback.grads[0], with_loss_term.grads[0], strict=True):
        torch.testing.assert_close(callback_grad, loss_term_grad, rtol=1e-6, atol=1e-8)
    tolerance = 1e-2 if "precision" in options else 1e-4  # sums in bfloat16 round differently
    torch.testing.assert_close(
        with_callback.net.state_dict(), with_loss_term.net.state_dict(), rtol=tolerance, atol=tolerance
    )
    fit(plain, **options)
    assert not torch.allclose(plain.net[1].weight, with_callback.net[1].weight, atol=1e-3)


def test_rho_penalty_and_masked_share_are_logged() -> None:
    class Metrics(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    logged: list[dict[str, float]] = []
    module = Small(optimizer=sgd())
    module.net[1].weight.data[:4] = torch.tensor([0.0, 0.0, -0.5, -0.5])
    graph = trace(module.net, torch.zeros(1, 1, 12, 12))
    p = channel_costs(graph, slimmable(graph, module.net))
    whole = 5 * float(p["1.weight"][0]) + 12 * float(p["4.weight"][0])  # of 8 scales in the first, 5 remain
    two = graph.layers["0.weight"][:2]
    callback = slimming(rho=0.2, warmup_epochs=2, shrink_at=1.0, end_epoch=2)
    fit(module, callback, Metrics(), epochs=4)
    expected = [(0.1, 0.1 * whole), (0.2, 0.2 * whole), (0.2, 0.2 * whole)]
    penalties = [(metrics["prune/rho"], metrics["prune/penalty"]) for metrics in logged[1:]]
    np.testing.assert_allclose(penalties, expected, rtol=1e-5)
    assert [metrics["prune/masked"] for metrics in logged[1:]] == pytest.approx(
        [1 - graph.cost("macs", two) / graph.cost("macs")] * 3
    )
    assert ["prune/change" in metrics for metrics in logged[1:]] == [False, False, True]


def test_the_penalty_equals_the_loss_term_with_param_groups_momentum_and_an_average() -> None:
    """At the end of training the averaged weights are copied to the module, so they are compared here."""

    def grouped(_: Any) -> torch.optim.Optimizer:
        first, last = list(module.net[:3].parameters()), list(module.net[3:].parameters())
        groups = [{"params": first, "lr": 0.02}, {"params": last, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    final_weights = []
    for rho, callbacks in ((0.03, []), (0.0, [slimming(rho=0.03, end_epoch=9)])):
        module = Small(rho, grouped)
        averaging = EMAWeightAveraging(decay=0.8)
        fit(module, *callbacks, averaging, epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5)
        final_weights.append(module.net.state_dict())
    torch.testing.assert_close(final_weights[1], final_weights[0], rtol=1e-4, atol=1e-5)


def test_costs_are_multiples_of_the_mean_as_in_atomnas() -> None:
    net = small_net()
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    scales = slimmable(graph, net)
    first, second = 144 * 9 + 36 * 9 * 12, 36 * 9 * 8 + 4  # MACs of a filter and of the inputs that read it
    mean = (8 * first + 12 * second) / 20
    costs = channel_costs(graph, scales)
    np.testing.assert_allclose(costs["1.weight"], first / mean)
    np.testing.assert_allclose(costs["4.weight"], second / mean)
    assert channel_costs(graph, scales, "params")["1.weight"][0] != pytest.approx(first / mean)
    with pytest.raises(ValueError, match="unknown resource 'seconds'; this graph has macs, params"):
        channel_costs(graph, scales, "seconds")


def test_any_resource_weights_the_penalty_and_negative_costs_count_as_zero() -> None:
    """Each channel of the first layer costs 1, each channel of the second one costs -1."""
    energy = LayerCost(lambda layer, ins, outs: {"net.0": outs, "net.3": 100 - outs}.get(layer, 1))
    callback = slimming(rho=0.05, by="energy", resources={"energy": energy}, submodule=None, end_epoch=9)
    module = Small(optimizer=sgd(0.1))
    fit(module, callback, limit_train_batches=1)
    plain = Small(optimizer=sgd(0.1))
    fit(plain, limit_train_batches=1)
    penalty_step = plain.net[1].weight - module.net[1].weight
    torch.testing.assert_close(
        penalty_step, torch.full((8,), 0.1 * 0.05 * 20 / 8)
    )  # 8 of 20 channels cost something
    assert torch.equal(module.net[4].weight, plain.net[4].weight)


def test_the_scales_of_a_residual_stream_share_its_cost() -> None:
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8))
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    scales = slimmable(graph, net)
    costs = channel_costs(graph, scales)
    unit = graph.layers["encoder.layer1.0.conv2.weight"][0]
    shared = [name for name, units in scales.items() if unit in units]
    assert len(shared) == 3  # those of the stem and of two blocks
    alone = graph.cost("macs") - graph.cost("macs", [unit])
    other = graph.layers["encoder.layer1.0.conv1.weight"][0]
    ratio = costs[shared[0]][0] / costs["encoder.layer1.0.bn1.weight"][0]
    assert ratio == pytest.approx(alone / 3 / (graph.cost("macs") - graph.cost("macs", [other])))


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scaler_the_penalty_has_its_full_size(fused: bool) -> None:
    """Fused optimizers unscale gradients themselves, after the hook: there the penalty is scaled like the loss."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1, fused=fused)

    with_loss_term, with_callback = Small(0.03, optimizer), Small(0.0, optimizer)
    for module, callbacks in ((with_loss_term, []), (with_callback, [slimming(rho=0.03, end_epoch=9)])):
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        plugin.precision = "16-mixed"
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        fit(module, *callbacks, plugins=[plugin], limit_train_batches=3)
    torch.testing.assert_close(
        with_callback.net.state_dict(), with_loss_term.net.state_dict(), rtol=1e-4, atol=1e-5
    )


def test_rho_rises_linearly_over_steps_or_epochs() -> None:
    class RelativeRho(L.Callback):
        def __init__(self, callback: SlimmingCallback) -> None:
            self.method, self.values = callback.method, []

        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            self.values.append(self.method._current_rho(trainer) / self.method.rho)

    for options, expected in (
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, *[1] * 13]),
        ({"warmup_epochs": 1}, [*[n / 8 for n in range(1, 9)], *[1] * 8]),
        ({}, [1] * 16),
    ):
        callback = slimming(rho=0.2, end_epoch=9, **options)
        relative_rho = RelativeRho(callback)
        fit(Small(), callback, relative_rho, epochs=2)
        assert relative_rho.values == pytest.approx(expected)


def test_the_penalty_creates_a_gradient_where_there_is_none() -> None:
    net = small_net()
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    penalty = Penalty.of(graph, net, slimmable(graph, net), "params")
    with torch.no_grad():
        net[1].weight[:2] = torch.tensor([0.0, -1.0])
    penalty.add_(0.5)
    p = penalty.weights["1.weight"]
    assert net[1].weight.grad[:3].tolist() == pytest.approx([0.0, -0.5 * float(p[1]), 0.5 * float(p[2])])
    assert net[0].weight.grad is None
