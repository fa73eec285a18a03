"""Tests of SlimmingCallback: which channels it removes and when, its checkpoints, and its errors."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from segmentation_models_pytorch import Unet
from torch import nn

from benchmarks.robustness import kill_run
from benchmarks.robustness.kill_run import Classifier, same, shuffled
from lightning_prune import SlimmingCallback, load_pruned, prune_, trace
from lightning_prune.callbacks.checkpoints import competes
from lightning_prune.criteria.reduction import norm_scales
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.slimming.bias_folding import MeasuredShifts
from lightning_prune.slimming.penalty import slimmable
from lightning_prune.slimming.policy import SlimmingPolicy, scale_sizes
from tests.support.slimming_runs import (
    QUIET,
    Small,
    fit,
    plan_small_scales,
    set_small_scales,
    sgd,
    slimming,
    small_net,
)

pytestmark = QUIET


def test_a_unit_stays_while_any_of_its_scales_is_large_in_model_or_average() -> None:
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8))
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    scales = slimmable(graph, net, norms=["encoder.*"])
    gammas = {name: torch.zeros(len(units)) for name, units in scales.items()}
    averaged = {name: value.clone() for name, value in gammas.items()}
    gammas["encoder.bn1.weight"][3] = -0.5
    averaged["encoder.layer1.1.bn2.weight"][5] = 0.25
    sizes = scale_sizes(graph, scales, [gammas, averaged])
    stream = graph.layers["encoder.layer1.0.conv2.weight"]
    assert sizes[stream[[3, 5]]].tolist() == [0.5, 0.25]
    assert not sizes[np.delete(stream, [3, 5])].any()
    decoder = graph.layers["decoder.blocks.0.conv1.0.weight"]
    assert np.isinf(sizes[decoder]).all()
    plan = SlimmingPolicy({}, limits=Limits(1.0, min_channels=1)).plan(graph, sizes, DenseSizes.of(graph))
    assert not np.isin(stream[[3, 5]], plan.remove).any()
    assert np.isin(np.delete(stream, [3, 5]), plan.remove).all()
    assert (
        scale_sizes(graph, scales, [averaged])[stream[3]] == 0
    )  # in the last epoch only the average is used


def test_shrinks_when_the_masked_share_is_reached_and_ends_with_the_budget() -> None:
    callback = slimming(budget={"macs": 0.5}, rho=0.3, threshold=0.1, shrink_at=0.1, end_epoch=7)
    module = Small(optimizer=sgd(0.05))
    fit(module, callback, epochs=9)
    early = [cut for cut in callback.history if cut.epoch < 7]
    assert early  # there were cuts before the last one
    shares = [1.0, *(cut.share["macs"] for cut in callback.history)]
    assert all(before - after >= 0.1 for before, after in pairwise(shares[: len(early) + 1]))
    assert shares[-1] <= 0.5
    assert callback.history[-1].stopped == "budget"
    assert callback.finished
    assert len(callback.changes) == len(callback.folded) == len(callback.history)


def test_without_a_budget_the_threshold_alone_decides() -> None:
    module = Small(optimizer=sgd())
    set_small_scales(module.net, 1e-4).train()
    callback = slimming(rho=0.0, shrink_at=1.0)
    fit(module, callback, epochs=2)
    assert [cut.epoch for cut in callback.history] == [1]
    assert (module.net[1].num_features, module.net[4].num_features) == (4, 6)
    assert callback.changes[0] < 0.05  # with zero padding folding is not exact


def test_the_final_cut_meets_the_budget_by_the_smallest_scales() -> None:
    module = Small(optimizer=sgd())
    module.net[1].weight.data = torch.arange(1.0, 9) + 20
    module.net[4].weight.data = torch.arange(1.0, 13)
    callback = slimming(budget={"macs": 0.6}, rho=0.0, end_epoch=0)
    fit(module, callback, epochs=2)
    kept = callback.record.kept["4.weight"][0]
    assert kept == list(range(12 - len(kept), 12))
    graph = trace(small_net(), torch.zeros(1, 1, 12, 12))
    dense, filter_cost = graph.cost("macs"), 36 * 9 * 8 + 4
    assert 12 - len(kept) == int(np.ceil(0.4 * dense / filter_cost))  # no more than the budget requires


@pytest.mark.parametrize("budget", [{"macs": 0.6}, None])
def test_a_network_is_considered_for_the_best_checkpoint_after_the_final_shrink_only(
    budget: dict[str, float] | None,
) -> None:
    states = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            states.append((competes(trainer), callback.finished))

    module = Small(optimizer=sgd())
    module.net[4].weight.data[:4] = 0
    callback = slimming(budget=budget, rho=0.0, shrink_at=1.0, end_epoch=1)
    fit(module, callback, Watch(), epochs=3, limit_train_batches=1)
    assert states == [(False, False), (False, True), (True, True)]


# -- inside a trainer ----------------------------------------------------------------------------------------


def test_a_moving_average_delays_the_cut_and_is_cut_and_folded_too() -> None:
    """The scales of the model are 0, those of the average decrease more slowly."""
    averaging = EMAWeightAveraging(decay=0.5)
    module = Small(optimizer=sgd())
    callback = slimming(rho=0.0, threshold=0.1, shrink_at=0.01)

    class Zero(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Small, *_: Any) -> None:
            with torch.no_grad():
                pl_module.net[4].weight[:6] = 0

    fit(module, callback, averaging, Zero(), epochs=1, limit_train_batches=2)
    assert not callback.history  # 0.5 in the average
    module = Small(optimizer=sgd())
    callback, averaging = slimming(rho=0.0, threshold=0.1, shrink_at=0.01), EMAWeightAveraging(decay=0.5)
    fit(module, callback, averaging, Zero(), epochs=1)
    assert module.net[4].num_features == 6
    assert averaging._average_model.module.net[4].num_features == 6


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_training_ends_with_the_same_bits(epoch: int, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == epoch and trainer.fit_loop.epoch_loop.batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "end.ckpt")

    def train(resume: Path | None = None) -> tuple[dict[str, Any], SlimmingCallback]:
        callback = slimming(
            budget={"macs": 0.3},
            rho=0.2,
            threshold=0.92,
            average_decay=0.5,
            shrink_at=0.05,
            end_epoch=2,
            warmup_steps=9,
            submodule=None,
        )
        callbacks = [callback] if resume else [Save(), callback]  # the checkpoint is written before the cut
        return kill_run.fit(Classifier(), shuffled(), callbacks, resume, max_epochs=4), callback

    expected, callback = train()
    assert [cut[0] for cut in expected["cuts"]] == [1, 2]
    for path in ("within.ckpt", "end.ckpt"):
        final_state, resumed = train(tmp_path / path)
        assert same(final_state, expected), path
        assert resumed.changes == callback.changes
        assert same(resumed.state_dict()["average"], callback.state_dict()["average"])


def test_a_slimmed_checkpoint_loads_without_a_trainer(tmp_path: Path) -> None:
    module, callback = Small(), slimming(budget={"macs": 0.6}, rho=0.01)
    trainer = fit(module, callback)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    loaded = load_pruned(Small(), tmp_path / "small.ckpt")
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert loaded.net[1].num_features == module.net[1].num_features < 8


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-mobilenetv3_small_050"])
def test_mobilenet_encoders_of_smp_are_slimmed(encoder: str) -> None:
    net = Unet(encoder, encoder_weights=None, in_channels=1, classes=2, decoder_channels=(16, 8, 8, 8, 8))
    set_small_scales(net, 0.0, every=4)
    example = torch.randn(1, 1, 32, 32)
    scales = norm_scales(trace(net, example), net)
    encoder_norms = [name for name in scales if name.startswith("encoder") and "features.0." not in name]
    graph, scales, plan = plan_small_scales(net, example, encoder_norms)
    measured = MeasuredShifts([net], graph, scales, plan.remove, ((example,), {}))
    prune_(net, graph, plan)
    folded = measured.fold_(plan.remove)
    assert plan.costs["macs"].after < 0.95 * plan.costs["macs"].before
    assert folded.exact > 10
    assert np.isfinite(measured.changes()[0])


class Segmenting(Small):
    """A U-Net with a frozen encoder of inverted residuals."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda parameters: sgd()([p for p in parameters if p.requires_grad]))
        self.net = Unet("mobilenet_v2", 3, None, decoder_channels=(16, 8, 8), in_channels=1, classes=4)
        set_small_scales(self.net, 0.0, every=4).train()
        self.net.encoder.requires_grad_(False)
        self.example_input_array = torch.zeros(1, 1, 32, 32)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        logits = self(nn.functional.interpolate(batch[0], size=(32, 32)))
        return nn.functional.cross_entropy(logits, batch[1][:, None, None].expand(-1, 32, 32))


def test_a_frozen_encoder_stays_and_its_decoder_is_slimmed() -> None:
    module, callback = Segmenting(), slimming(rho=0.0)
    before = {name: p.clone() for name, p in module.net.encoder.named_parameters()}
    fit(module, callback, limit_train_batches=2)
    assert callback.history[0].filters == 2 * (4 + 2 + 2)  # a quarter of each
    assert same(dict(module.net.encoder.named_parameters()), before)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1e-4}, r"rho must be a number of 0 or more, got -0.0001"),
        ({"rho": float("nan")}, r"rho must be"),
        ({"threshold": -1.0}, r"threshold must be a number of 0 or more"),
        ({"shrink_at": 1.5}, r"shrink_at must be in \[0, 1\], got 1.5"),
        ({"average_decay": 2}, r"average_decay must be in \[0, 1\]"),
        ({"warmup_epochs": 2, "warmup_steps": 3}, r"give warmup_epochs or warmup_steps, not both"),
        ({"warmup_steps": -3}, r"warmup_steps must be"),
        ({"rho": float("inf")}, r"rho must be a number of 0 or more, got inf"),
        ({"threshold": float("nan")}, r"threshold must be"),
        ({"threshold": float("inf")}, r"threshold must be"),
        ({"average_decay": 1.0}, r"average_decay must be less than 1, or the average never changes"),
        ({"end_epoch": -1}, r"end_epoch must be a number of 0 or more, got -1"),
        (
            {"warmup_epochs": 5, "end_epoch": 3},
            r"the warm-up of rho would end after slimming: warmup_epochs=5, end_epoch=3",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimmingCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": ["encoder.*"]}, r"norm 'encoder\.\*' matches no layer; did you mean"),
        ({"by": "seconds"}, r"unknown resource 'seconds'"),
        ({"exclude": ["net.0", "net.3"]}, "nothing to prune"),
        ({"budget": {"macs": 1e-9}}, "cannot be met"),
        ({"budget": {"joules": 0.5}}, "unknown resource 'joules' in budget"),
    ],
)
def test_a_network_that_cannot_be_slimmed_is_refused_before_anything_changes(
    options: dict[str, Any], message: str
) -> None:
    module = Small()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(module, slimming(**{"submodule": None, **options}))
    assert same(module.state_dict(), before)


def test_networks_without_norms_are_refused() -> None:
    module = Small()
    module.net[1], module.net[4] = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="no norm to slim: no filter of this network passes through a norm"):
        fit(module, slimming())


def test_frozen_norms_are_refused() -> None:
    module = Small()
    module.net[1].requires_grad_(False)
    module.net[4].requires_grad_(False)
    with pytest.raises(ValueError, match="or are frozen"):
        fit(module, slimming())
