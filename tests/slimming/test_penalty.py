"""The penalty is what the gradient of the written loss term would be, under all that a trainer does."""

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
def test_the_penalty_is_autograd_s_gradient_of_the_written_loss_term(options: dict[str, Any]) -> None:
    """And so are all weights after training with it: accumulated, clipped and stepped alike."""
    written, added, plain = (Small(rho, sgd(0.1)) for rho in (0.03, 0.0, 0.0))
    fit(written, **options)
    fit(added, slimming(rho=0.03, end_epoch=9), **options)
    assert len(written.grads) == len(added.grads) == 8 // options.get("accumulate_grad_batches", 1)
    for ours, theirs in zip(added.grads[0], written.grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    tolerance = 1e-2 if "precision" in options else 1e-4  # sums of bfloat16 round otherwise
    torch.testing.assert_close(
        added.net.state_dict(), written.net.state_dict(), rtol=tolerance, atol=tolerance
    )
    fit(plain, **options)
    assert not torch.allclose(plain.net[1].weight, added.net[1].weight, atol=1e-3)


def test_what_is_logged_is_the_penalty_with_rho_and_the_masked_share() -> None:
    class Seen(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    seen: list[dict[str, float]] = []
    module = Small(optimizer=sgd())
    module.net[1].weight.data[:4] = torch.tensor([0.0, 0.0, -0.5, -0.5])
    graph = trace(module.net, torch.zeros(1, 1, 12, 12))
    p = channel_costs(graph, slimmable(graph, module.net))
    whole = 5 * float(p["1.weight"][0]) + 12 * float(p["4.weight"][0])  # of 8 scales in the first, 5 remain
    two = graph.layers["0.weight"][:2]
    callback = slimming(rho=0.2, warmup_epochs=2, shrink_at=1.0, end_epoch=2)
    fit(module, callback, Seen(), epochs=4)
    expected = [(0.1, 0.1 * whole), (0.2, 0.2 * whole), (0.2, 0.2 * whole)]
    found = [(each["prune/rho"], each["prune/penalty"]) for each in seen[1:]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert [each["prune/masked"] for each in seen[1:]] == pytest.approx(
        [1 - graph.cost("macs", two) / graph.cost("macs")] * 3
    )
    assert ["prune/change" in each for each in seen[1:]] == [False, False, True]


def test_param_groups_momentum_and_an_average_see_the_written_penalty() -> None:
    """In the end the averaged weights are the module's, so that they are compared."""

    def grouped(_: Any) -> torch.optim.Optimizer:
        first, last = list(module.net[:3].parameters()), list(module.net[3:].parameters())
        groups = [{"params": first, "lr": 0.02}, {"params": last, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    ends = []
    for rho, callbacks in ((0.03, []), (0.0, [slimming(rho=0.03, end_epoch=9)])):
        module = Small(rho, grouped)
        averaging = EMAWeightAveraging(decay=0.8)
        fit(module, *callbacks, averaging, epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5)
        ends.append(module.net.state_dict())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_costs_are_multiples_of_the_mean_as_in_atomnas() -> None:
    net = small_net()
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    scales = slimmable(graph, net)
    first, second = 144 * 9 + 36 * 9 * 12, 36 * 9 * 8 + 4  # MACs of a filter, with those of who reads it
    mean = (8 * first + 12 * second) / 20
    costs = channel_costs(graph, scales)
    np.testing.assert_allclose(costs["1.weight"], first / mean)
    np.testing.assert_allclose(costs["4.weight"], second / mean)
    assert channel_costs(graph, scales, "params")["1.weight"][0] != pytest.approx(first / mean)
    with pytest.raises(ValueError, match="unknown resource 'seconds'; this graph has macs, params"):
        channel_costs(graph, scales, "seconds")


def test_any_resource_pushes_and_never_the_other_way() -> None:
    """Of the first layer's channels each costs one more, of the second's each costs one less than nothing."""
    energy = LayerCost(lambda layer, ins, outs: {"net.0": outs, "net.3": 100 - outs}.get(layer, 1))
    callback = slimming(rho=0.05, by="energy", resources={"energy": energy}, submodule=None, end_epoch=9)
    module = Small(optimizer=sgd(0.1))
    fit(module, callback, limit_train_batches=1)
    plain = Small(optimizer=sgd(0.1))
    fit(plain, limit_train_batches=1)
    pushed = plain.net[1].weight - module.net[1].weight
    torch.testing.assert_close(
        pushed, torch.full((8,), 0.1 * 0.05 * 20 / 8)
    )  # 8 of 20 channels cost something
    assert torch.equal(module.net[4].weight, plain.net[4].weight)


def test_a_stream_s_scales_share_its_cost() -> None:
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8))
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    scales = slimmable(graph, net)
    costs = channel_costs(graph, scales)
    unit = graph.layers["encoder.layer1.0.conv2.weight"][0]
    shared = [name for name, units in scales.items() if unit in units]
    assert len(shared) == 3  # the stem's, and those of two blocks
    alone = graph.cost("macs") - graph.cost("macs", [unit])
    other = graph.layers["encoder.layer1.0.conv1.weight"][0]
    ratio = costs[shared[0]][0] / costs["encoder.layer1.0.bn1.weight"][0]
    assert ratio == pytest.approx(alone / 3 / (graph.cost("macs") - graph.cost("macs", [other])))


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_loss_scale_the_penalty_is_not_scaled_down(fused: bool) -> None:
    """Fused optimizers unscale gradients themselves, after the hook: there the penalty is scaled like the loss."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1, fused=fused)

    written, added = Small(0.03, optimizer), Small(0.0, optimizer)
    for module, callbacks in ((written, []), (added, [slimming(rho=0.03, end_epoch=9)])):
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        plugin.precision = "16-mixed"
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        fit(module, *callbacks, plugins=[plugin], limit_train_batches=3)
    torch.testing.assert_close(added.net.state_dict(), written.net.state_dict(), rtol=1e-4, atol=1e-5)


def test_rho_rises_by_steps_or_epochs() -> None:
    class Rhos(L.Callback):
        def __init__(self, of: SlimmingCallback) -> None:
            self.of, self.seen = of, []

        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            self.seen.append(self.of.method._current_rho(trainer) / self.of.method.rho)

    for options, expected in (
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, *[1] * 13]),
        ({"warmup_epochs": 1}, [*[n / 8 for n in range(1, 9)], *[1] * 8]),
        ({}, [1] * 16),
    ):
        callback = slimming(rho=0.2, end_epoch=9, **options)
        rhos = Rhos(callback)
        fit(Small(), callback, rhos, epochs=2)
        assert rhos.seen == pytest.approx(expected)


def test_the_penalty_makes_a_gradient_where_there_is_none() -> None:
    net = small_net()
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    penalty = Penalty.of(graph, net, slimmable(graph, net), "params")
    with torch.no_grad():
        net[1].weight[:2] = torch.tensor([0.0, -1.0])
    penalty.add_(0.5)
    p = penalty.weights["1.weight"]
    assert net[1].weight.grad[:3].tolist() == pytest.approx([0.0, -0.5 * float(p[1]), 0.5 * float(p[2])])
    assert net[0].weight.grad is None
