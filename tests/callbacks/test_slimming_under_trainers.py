"""Tests of SlimmingCallback with other features of a trainer: it supports them, or explains why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import BudgetEarlyStopping, FilterPruningCallback, trace
from lightning_prune.slimming.bias_folding import Folded
from tests.support.slimming_runs import QUIET, Small, fit, loader, sgd, slimming, small_net

pytestmark = QUIET


def with_dead_norm(module: Small) -> Small:
    """Set every other scale of the first norm to 0, and its shifts to random values."""
    module.net[1].weight.data[::2] = 0
    module.net[1].bias.data.normal_()
    return module


class AtEpochStart(L.Callback):
    """Calls a function when an epoch starts."""

    def __init__(self, epoch: int, action: Callable[[L.Trainer, Any], Any]) -> None:
        self.epoch, self.action = epoch, action

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.action(trainer, pl_module)


# -- optimizers ------------------------------------------------------------------------------------------------


class Manual(Small):
    """Manual optimization with one optimizer for the first layers and another for the last ones."""

    automatic_optimization = False
    toggles = False

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [sgd(0.05)(self.net[:3].parameters()), sgd(0.05)(self.net[3:].parameters())]


class Toggling(Manual):
    toggles = True


def test_under_manual_optimization_each_step_has_the_penalty_of_its_optimizer_s_scales() -> None:
    """Each optimizer steps after the other one; a penalty in the loss gives the same weights."""
    with_loss_term, with_callback = Manual(0.03), Manual()
    fit(with_loss_term, epochs=2)
    fit(with_callback, slimming(rho=0.03, end_epoch=9), epochs=2)
    torch.testing.assert_close(
        with_callback.net.state_dict(), with_loss_term.net.state_dict(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("module", [Manual, Toggling])
def test_under_manual_optimization_scales_shrink_and_channels_are_cut(module: type[Manual]) -> None:
    callback = slimming(budget={"macs": 0.5}, rho=0.3, threshold=0.2, shrink_at=0.1, end_epoch=7)
    trained = module()
    fit(trained, callback, epochs=9)
    assert callback.within_budget or callback.history[-1].share["macs"] <= 0.5
    assert float(trained.net[1].weight.detach().max()) < 0.6


class Unwrapped(Manual):
    """Steps the optimizers without the wrapper of Lightning."""

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.zero_grad()
            self.manual_backward(Small.training_step(self, batch, index))
            optimizer.step()


def test_steps_of_unwrapped_optimizers_warn_once_that_the_penalty_is_missing() -> None:
    with pytest.warns(
        UserWarning, match=r"the penalty does not reach 2 of 2 scales \(1.weight, 4.weight\)"
    ) as warned:
        fit(Unwrapped(), slimming(), epochs=3)
    assert sum("the penalty does not reach" in str(warning.message) for warning in warned) == 1


def test_scales_that_belong_to_no_optimizer_are_named() -> None:
    module = Small()
    module.optimizer = lambda _: sgd(0.05)(module.net[3:].parameters())
    with pytest.warns(UserWarning, match=r"the penalty does not reach 1 of 2 scales \(1.weight\)"):
        fit(module, slimming(rho=0.3))
    assert torch.equal(module.net[1].weight, torch.ones(8))


def test_the_penalty_follows_scales_that_are_frozen_and_unfrozen_during_training() -> None:
    def switch(trainer: L.Trainer, module: Small) -> None:
        module.net[1].requires_grad_(True)
        module.net[4].requires_grad_(False)
        at_switch.append(module.net[4].weight.detach().clone())

    at_switch: list[Tensor] = []
    module = Small(optimizer=sgd(0.05))
    module.net[1].requires_grad_(False)
    fit(module, slimming(rho=0.3, end_epoch=9), AtEpochStart(1, switch), epochs=3)
    assert torch.equal(module.net[4].weight, at_switch[0])
    assert float(at_switch[0].mean()) < 0.95
    assert float(module.net[1].weight.detach().mean()) < 0.9


def test_scales_that_lightning_s_finetuning_unfreezes_get_the_penalty() -> None:
    class UnfreezeInEpoch1(BaseFinetuning):
        def freeze_before_training(self, pl_module: L.LightningModule) -> None:
            self.freeze(pl_module.net[:3], train_bn=False)

        def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.05)

    module = Small(optimizer=lambda parameters: sgd(0.05)([p for p in parameters if p.requires_grad]))
    fit(module, slimming(rho=0.3, end_epoch=9), UnfreezeInEpoch1(), epochs=3)
    assert float(module.net[1].weight.detach().mean()) < 0.9


# -- when training ends ----------------------------------------------------------------------------------------


def test_a_stop_that_min_epochs_delays_does_not_end_slimming() -> None:
    stop = AtEpochStart(1, lambda trainer, _: setattr(trainer, "should_stop", True))
    callback = slimming(budget={"macs": 0.5})
    trainer = fit(Small(), stop, callback, epochs=6, min_epochs=4)
    assert trainer.current_epoch == 4
    assert [cut.epoch for cut in callback.history] == [3]


class ConstantMetric(Small):
    """Logs a metric that never improves."""

    def on_train_epoch_end(self) -> None:
        self.log("metric", 1.0)


def test_early_stopping_before_the_last_shrink_warns() -> None:
    """Lightning calls callbacks that monitor a metric after all others, too late for the cut."""
    with pytest.warns(UserWarning, match="stopped before the last shrink.*BudgetEarlyStopping"):
        fit(
            with_dead_norm(ConstantMetric()),
            slimming(shrink_at=1.0),
            EarlyStopping("metric", patience=1),
            epochs=9,
        )


def test_budget_early_stopping_waits_for_the_last_shrink() -> None:
    callback, stopping = slimming(shrink_at=1.0, end_epoch=3), BudgetEarlyStopping("metric", patience=1)
    trainer = fit(with_dead_norm(ConstantMetric(optimizer=sgd())), callback, stopping, epochs=9)
    assert [cut.epoch for cut in callback.history] == [3]
    assert 4 < trainer.current_epoch < 9


def test_stochastic_weight_averaging_comes_after_the_last_shrink() -> None:
    callback = slimming(budget={"macs": 0.5}, rho=0.1, end_epoch=1)
    module = Small()
    fit(module, callback, StochasticWeightAveraging(0.01, swa_epoch_start=2), epochs=5)
    assert [cut.epoch for cut in callback.history] == [1]
    assert trace(module.net, torch.zeros(1, 1, 12, 12)).cost("macs") == callback.history[0].after["macs"]


# -- precision, data, compilers --------------------------------------------------------------------------------


def test_in_bfloat16_the_average_changes_by_less_than_bfloat16_resolves() -> None:
    module = Small(optimizer=sgd(0.05))
    callback = slimming(rho=0.3, average_decay=0.999, end_epoch=9)
    fit(module, callback, epochs=2, precision="bf16-true")
    assert module.net[1].weight.dtype is torch.bfloat16
    average = callback.state_dict()["average"]["1.weight"]
    assert bool((average < 1).all() & (average > module.net[1].weight).all())


class TwoLoaders(Small):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch["left"], index)


def test_with_several_loaders_shifts_are_folded_and_norms_estimated() -> None:
    module, callback = with_dead_norm(TwoLoaders(optimizer=sgd())), slimming(rho=0.0, threshold=1e-3)
    module.example_input_array = torch.zeros(1, 1, 12, 12)
    fit(module, callback, data={"left": loader(), "right": loader(16)})
    assert callback.folded == [Folded(approximate=1)]
    assert 0 < callback.changes[0] < 0.5


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_networks_are_slimmed(in_place: bool) -> None:
    module, callback = with_dead_norm(Small(optimizer=sgd())), slimming(rho=0.0)
    plain, expected = with_dead_norm(Small(optimizer=sgd())), slimming(rho=0.0)
    plain.load_state_dict(module.state_dict())
    if in_place:
        module.net.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    fit(module, callback, epochs=2)
    fit(plain, expected, epochs=2)
    assert module.net.get_submodule("1").num_features == 4
    assert callback.changes == pytest.approx(expected.changes)


def test_a_loader_with_persistent_workers_continues_after_a_cut() -> None:
    module, callback = with_dead_norm(Small(optimizer=sgd())), slimming(rho=0.0, end_epoch=1)
    data = DataLoader(loader().dataset, 4, num_workers=1, persistent_workers=True)
    trainer = fit(module, callback, epochs=3, data=data)
    assert callback.folded == [Folded(approximate=1)]
    assert trainer.global_step == 24


class ClassOutput(Small):
    """Its forward returns classes, and calls layers with keyword arguments."""

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).argmax(1)

    def logits(self, x: Tensor) -> Tensor:
        features = self.net[2](self.net[1](self.net[0](input=x)))
        return self.net[4:](self.net[3](input=features))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])


def test_without_floating_point_outputs_the_change_is_nan_and_shifts_are_folded() -> None:
    module, callback = with_dead_norm(ClassOutput(optimizer=sgd())), slimming(rho=0.0, submodule=None)
    fit(module, callback)
    assert callback.folded == [Folded(approximate=1)]
    assert math.isnan(callback.changes[0])


def test_resumed_training_accepts_a_threshold_above_all_scales(tmp_path: Path) -> None:
    """A threshold above all scales is an error only when training starts."""
    options = {"rho": 0.3, "threshold": 0.98, "budget": {"macs": 0.6}, "shrink_at": 1.0, "end_epoch": 2}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "faded.ckpt")

    uninterrupted, resumed = Small(optimizer=sgd(0.05)), Small(optimizer=sgd(0.05))
    fit(uninterrupted, slimming(**options), Save(), epochs=4)
    assert uninterrupted.net[1].num_features + uninterrupted.net[4].num_features < 20
    fit(resumed, slimming(**options), epochs=4, ckpt_path=tmp_path / "faded.ckpt")
    for name, tensor in uninterrupted.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], tensor), name


# -- other norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        lambda n: nn.GroupNorm(4, n),  # one channel of each group is removed
        lambda n: nn.GroupNorm(1, n),
        lambda n: nn.InstanceNorm2d(n, affine=True),
    ],
    ids=["groups", "one group", "instance"],
)
def test_other_norms_lose_channels_and_the_change_of_their_statistics_is_reported(norm: Any) -> None:
    module, callback = Small(optimizer=sgd()), slimming(rho=0.0)
    module.net[1], module.net[4] = norm(8), norm(12)
    fit(with_dead_norm(module), callback)
    assert module.net[1].weight.numel() == 4
    assert 0 < callback.changes[0] < 0.5


def test_networks_with_only_norms_without_scales_are_refused() -> None:
    module = Small()
    module.net[1], module.net[4] = nn.BatchNorm2d(8, affine=False), nn.InstanceNorm2d(12)
    with pytest.raises(
        ValueError, match="no norm to slim: no filter of this network passes through a norm with a scale"
    ):
        fit(module, slimming())


# -- bad input -----------------------------------------------------------------------------------------------


def test_a_threshold_above_all_scales_is_refused() -> None:
    module = Small()
    with pytest.raises(ValueError, match=r"threshold=2.0 is not below any scale, the largest is 1:"):
        fit(module, slimming(threshold=2.0))
    assert module.net[1].num_features == 8


def test_two_callbacks_that_prune_one_network_are_refused() -> None:
    other = FilterPruningCallback({"macs": 0.7}, submodule="net", verbose=False)
    with pytest.raises(ValueError, match="got FilterPruningCallback and SlimmingCallback"):
        fit(Small(), other, slimming())


@pytest.mark.parametrize("kind", [FilterPruningCallback, slimming])
def test_a_callback_that_has_pruned_a_network_is_refused_for_a_fresh_one(kind: Any) -> None:
    callback = kind(budget={"macs": 0.7}, submodule="net", verbose=False)
    fit(Small(), callback, epochs=3)
    fresh = Small()
    with pytest.raises(
        ValueError, match="has pruned a network of other sizes; give a fresh network a new callback"
    ):
        fit(fresh, callback)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.net.state_dict().values(), small_net().state_dict().values(), strict=True)
    )
