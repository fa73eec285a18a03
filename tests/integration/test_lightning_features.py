"""Tests that precision, speed features and other callbacks of Lightning work the same before and after cuts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn, optim
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lightning_prune import IPAD, FilterPruningCallback
from lightning_prune.criteria import FunctionCriterion
from tests.callbacks.test_pruning import Tupled, cost, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning"),
]
MODES = ["carry", "reset"]
Pruning = partial(FilterPruningCallback, {"macs": 0.5}, verbose=False)


def assert_pruned_and_learnt(module: Tupled, pruning: FilterPruningCallback, share: float = 0.5) -> None:
    """Assert that several cuts met the budget, and that the loss fell further after the last one."""
    assert len(pruning.history) > 1
    assert pruning.history[-1].share["macs"] <= share
    epochs = [sum(module.losses[i : i + 4]) for i in range(0, len(module.losses), 4)]
    assert epochs[-1] < 0.9 * epochs[pruning.history[-1].epoch]
    assert epochs[-1] < 0.5 * epochs[0]


# -- precision and steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", MODES)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_mixed_precision_clipping_and_accumulation_across_the_end_of_epochs(optimizer, algorithm):
    module, pruning = Tupled(), Pruning(optimizer=optimizer)
    fit = trainer(
        pruning,
        epochs=16,
        precision="bf16-mixed",
        accumulate_grad_batches=3,  # of four batches: the fourth is a step of its own
        gradient_clip_val=0.5,
        gradient_clip_algorithm=algorithm,
    )
    fit.fit(module, data())
    assert fit.global_step == 16 * 2
    assert_pruned_and_learnt(module, pruning)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU")
@pytest.mark.parametrize("optimizer", MODES)
def test_a_gradient_scaler_continues_after_cuts(optimizer):
    module, pruning = Tupled(), Pruning(optimizer=optimizer)
    fit = trainer(pruning, epochs=16, precision="16-mixed", accelerator="gpu", devices=1)
    fit.fit(module, data())
    assert fit.precision_plugin.scaler.get_scale() > 1
    assert_pruned_and_learnt(module, pruning)


class ManualOptimization(Tupled):
    """Has two optimizers, stepped manually, each with a scheduler."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = optim.AdamW(self.net[:6].parameters(), 1e-2)
        head = optim.SGD(self.net[6:].parameters(), 0.1, momentum=0.9)
        return [body, head], [optim.lr_scheduler.StepLR(o, 100) for o in (body, head)]


@pytest.mark.parametrize("optimizer", MODES)
def test_two_optimizers_with_manual_optimization(optimizer):
    module, pruning = ManualOptimization(), Pruning(optimizer=optimizer)
    fit = trainer(pruning, epochs=14)
    fit.fit(module, data())
    assert_pruned_and_learnt(module, pruning)
    states = [(p, value) for o in fit.optimizers for p, state in o.state.items() for value in state.values()]
    assert all(value.shape in (p.shape, ()) for p, value in states)


@pytest.mark.parametrize("optimizer", MODES)
def test_a_loss_that_the_module_keeps_does_not_keep_the_old_shapes(optimizer):
    """Autograd keeps the node that accumulates a gradient as long as the graph of a loss refers to it."""

    class Keeping(Tupled):
        def training_step(self, batch: Any, index: int) -> Tensor:
            self.kept = super().training_step(batch, index)
            return self.kept

    module, pruning = Keeping(), Pruning(optimizer=optimizer)
    trainer(pruning, epochs=14).fit(module, data())
    assert_pruned_and_learnt(module, pruning)


# -- schedulers ----------------------------------------------------------------------------------------------


def one_cycle(optimizer: optim.Optimizer, module: L.LightningModule) -> dict[str, Any]:
    total = module.trainer.estimated_stepping_batches
    return {"scheduler": optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total), "interval": "step"}


def warm_up(optimizer: optim.Optimizer, module: L.LightningModule) -> Any:
    parts = [
        optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
        optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    return optim.lr_scheduler.SequentialLR(optimizer, parts, [2])


def plateau(optimizer: optim.Optimizer, module: L.LightningModule) -> dict[str, Any]:
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"scheduler": scheduler, "monitor": "loss"}


class Scheduled(Tupled):
    def __init__(self, schedule: Callable[..., Any]) -> None:
        super().__init__()
        self.schedule = schedule
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = optim.AdamW(self.parameters(), 1e-2)
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, self)}

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("schedule", [one_cycle, warm_up, plateau])
def test_schedules_continue_with_carry_and_restart_with_reset(schedule):
    rates = {}
    for mode in ("none", *MODES):
        module = Scheduled(schedule)
        pruning = Pruning(optimizer=mode, amount={"macs": 1}, start_epoch=2) if mode != "none" else None
        trainer(*[pruning] if pruning else [], epochs=6).fit(module, data())
        rates[mode] = module.rates
    assert rates["carry"] == rates["none"]
    assert len(set(rates["none"])) > 1
    assert rates["reset"] == [*rates["none"][:12], *rates["none"][:12]]


# -- speed features ------------------------------------------------------------------------------------------


def compiled_part(backend: Any) -> tuple[Tupled, Any]:
    module = Tupled()
    module.net.compile(backend=backend)
    return module, module


def compiled_wrapper(backend: Any) -> tuple[Tupled, Any]:
    module = Tupled()
    module.net = torch.compile(module.net, backend=backend)
    return module, module


def compiled_whole(backend: Any) -> tuple[Tupled, Any]:
    module = Tupled()
    return module, torch.compile(module, backend=backend)


@pytest.mark.parametrize("make", [compiled_part, compiled_wrapper, compiled_whole])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # in dynamo, from self.log
def test_compiled_code_is_compiled_again_after_a_cut(make):
    torch.compiler.reset()
    counter = CompileCounter()
    module, fitted = make(counter)
    counts: list[int] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(counter.frame_count)

    pruning = Pruning(criterion=IPAD(omega=0.5), optimizer="carry")
    trainer(Watch(), pruning, epochs=14).fit(fitted, data())
    assert_pruned_and_learnt(module, pruning)
    assert counts[0] >= 1
    assert (
        counts[pruning.history[0].epoch + 1] > counts[pruning.history[0].epoch]
    )  # a graph of the new shapes
    x = torch.randn(5, 1, 12, 12)
    with torch.no_grad():
        output = module.eval()(x)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(output, module(x))


def test_compiled_networks_are_observed_in_a_pass():
    """Compiled code skips hooks; the pass runs eagerly, and its statistics are those of the weights at the cut."""
    layers: list[set[str]] = []

    def spy(graph: Any, model: nn.Module, statistics: Any) -> Any:
        layers.append(set(statistics))
        return IPAD(omega=0.5)(graph, model, statistics)

    torch.compiler.reset()
    module, _ = compiled_part("eager")
    criterion = FunctionCriterion(spy, IPAD(omega=0.5).observer)
    trainer(Pruning(criterion=criterion, amount={"macs": 1}), epochs=3).fit(module, data())
    assert layers == [{"net.0.weight", "net.3.weight"}]


def test_channels_last_stays():
    module, pruning = Tupled().to(memory_format=torch.channels_last), Pruning(optimizer="carry")
    trainer(pruning, epochs=8).fit(module, data())
    assert pruning.history
    weight = module.net[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


class Recomputed(Tupled):
    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        x = self.net[:3](x)
        return self.net[6:](checkpoint(self.net[3:6], x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """Except batch norms, which process every batch twice, with and without pruning; a repair reads them."""

    def run(reentrant: bool | None) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        module = Recomputed()
        module.reentrant = reentrant
        pruning = Pruning(
            criterion=IPAD(omega=0.5), optimizer="carry", compensate=False, recalibrate_batches=0
        )
        trainer(pruning, epochs=8).fit(module, data(shuffle=False))
        return pruning.record.kept, module.losses

    kept, losses = run(None)
    kept_too, losses_too = run(reentrant)
    assert kept_too == kept
    assert losses_too == pytest.approx(losses, rel=1e-4)


# -- other callbacks -----------------------------------------------------------------------------------------


class Rated(Tupled):
    """Has a learning rate that can be found."""

    def __init__(self, example: bool) -> None:
        super().__init__(example)
        self.lr = 1e-4

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), self.lr)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_does_not_change_the_later_cuts(example, first, tmp_path):
    module, pruning, finder = Rated(example), Pruning(), LearningRateFinder(1e-4, 0.1, 20)
    callbacks = [finder, pruning] if first else [pruning, finder]
    fit = trainer(*callbacks, epochs=8, default_root_dir=tmp_path, enable_progress_bar=False)
    fit.fit(module, data())
    assert module.lr == finder.optimal_lr.suggestion()
    assert fit.optimizers[0].param_groups[0]["lr"] == module.lr
    assert pruning.history[0].epoch == 1
    assert pruning.history[0].before["macs"] == cost(Tupled())
    assert pruning.state_dict()["dense"]["costs"]["macs"] == cost(Tupled())
    assert pruning.history[-1].share["macs"] <= 0.5


def test_early_stopping_works_with_pruning():
    module, pruning = Tupled(), FilterPruningCallback({"macs": 0.8})
    stop = EarlyStopping("loss", patience=2, stopping_threshold=0.05, check_on_train_epoch_end=True)
    fit = trainer(pruning, stop, epochs=60)
    fit.fit(module, data())
    assert stop.stopped_epoch == fit.current_epoch - 1 < 50


class Backbone(Tupled):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:6], self.net[6:]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-2)


@pytest.mark.parametrize("optimizer", MODES)
@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_backbone_is_pruned_and_unfrozen_with_its_own_learning_rate(optimizer, first):
    module, pruning = Backbone(), Pruning(optimizer=optimizer)
    finetuning = BackboneFinetuning(
        3, lambda epoch: 1.0, backbone_initial_lr=1e-3, train_bn=False, should_align=False
    )
    groups: list[list[tuple[int, float]]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                parameter_groups = trainer.optimizers[0].param_groups
                groups.append([(len(group["params"]), group["lr"]) for group in parameter_groups])

    callbacks = [finetuning, pruning] if first else [pruning, finetuning]
    trainer(*callbacks, Watch(), epochs=9).fit(module, data())
    assert module.backbone[0].out_channels + module.backbone[3].out_channels < 48
    assert min(c.epoch for c in pruning.history) < 3 <= max(c.epoch for c in pruning.history)
    assert groups[:3] == [[(6, 1e-2)]] * 3  # the head, and norms, which Lightning does not freeze
    assert groups[3:] == [[(6, 1e-2), (4, 1e-3)]] * 6  # the convolutions' weights and biases


def test_bars_summaries_and_monitors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module, pruning = Tupled(True), FilterPruningCallback({"macs": 0.6})
    others = [RichProgressBar(), RichModelSummary(), ModelSummary(2), LearningRateMonitor()]
    logger = CSVLogger(tmp_path)
    fit = trainer(pruning, *others, epochs=6, logger=logger, enable_progress_bar=True, log_every_n_steps=1)
    fit.fit(module, data())
    assert "cut" in capsys.readouterr().out
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "lr-AdamW" in rows
    assert "prune/macs" in rows


# -- tests and open issues of Lightning's own pruning callback ---------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_the_callback_can_be_copied_before_and_after_training(copied):
    """Lightning's issue 7505: a deepcopy of the trainer's callbacks failed."""
    pruning, module = Pruning(), Tupled()
    fresh = copied(pruning)
    trainer(pruning, epochs=6).fit(module, data())
    assert copied(pruning).record.kept == pruning.record.kept
    other = Tupled()
    trainer(fresh, epochs=6).fit(other, data())
    assert fresh.history


def test_a_module_can_be_copied_while_it_is_pruned():
    copies: list[Tupled] = []

    class Copy(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            copies.append(copy.deepcopy(pl_module))

    module = Tupled()
    trainer(Pruning(criterion=IPAD(omega=0.5)), Copy(), epochs=7).fit(module, data())
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(copies[-1].eval()(x), module.eval()(x))


def test_amounts_are_shares_of_the_dense_network_and_the_logged_share_is_exact():
    """ModelPruning's amount is of what is left (issue 13595: and logs the wrong sparsity); ours of the dense net."""
    module, pruning = Tupled(), Pruning(amount={"macs": 0.2}, criterion=IPAD(omega=1.0))
    trainer(pruning, epochs=6).fit(module, data())
    shares = [cut.share["macs"] for cut in pruning.history]
    assert shares == pytest.approx([0.8, 0.6, 0.5], abs=0.05)
    assert shares[-1] == cost(module) / cost(Tupled())
    assert all(parameter.count_nonzero() > 0 for parameter in module.parameters())


def test_two_callbacks_in_one_trainer_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FilterPruningCallback`"):
        trainer(Pruning(), Pruning())
