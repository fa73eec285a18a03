"""``FilterPruningCallback``: says when to prune; the engine says how (level 4)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.optim import Optimizer

from lightning_prune.averages import Average, averages, check_target, counterparts, swa_is_over
from lightning_prune.batches import Example, as_example, same_shapes, switched
from lightning_prune.criteria import IPAD, Criterion
from lightning_prune.cutting import Cut, Rules, Run, facts, gathers, unmet
from lightning_prune.graph import Resource
from lightning_prune.limits import DenseSizes, Limits
from lightning_prune.loop import (
    before_loading,
    carry_along,
    check_batches,
    check_choice,
    check_strategy,
    first_sample,
    forward_context,
    fresh_optimizers_,
    is_compiled,
    is_last_epoch,
    rebuild_wrapper_,
    renew_norms_,
    target_of,
    train_inputs,
)
from lightning_prune.processes import gathered
from lightning_prune.record import PruningRecord
from lightning_prune.resume import Resumption
from lightning_prune.saving import CHECKPOINT_KEY, check_weights, has_shapes_of, part_of, shrink_

__all__ = ["FilterPruningCallback", "pruning_callbacks"]

OptimizerMode = Literal["reset", "carry"]
StatisticsMode = Literal["epoch", "pass"]
STEP = 0.1
RECALIBRATION = 16
BY_WEIGHT = IPAD(omega=1.0)  # the best and steadiest of the sweep in the README
THREE_QUARTERS = Limits()


class FilterPruningCallback(L.Callback):
    """Removes filters at the end of chosen epochs, for good, and lets training go on.

    Each cut traces dependencies, scores units by ``criterion``, selects the least important ones until the
    budget (or this step's amount) is reached, and removes them from the module; the cut is proven or rolled
    back. The LightningModule needs no change: what is traced is its ``forward`` on ``example_input_array``,
    else on one sample of the first training batch.

    Args:
        budget: what is to remain, for one resource or several, of which all must be met: ``"macs"`` or
            ``"params"``, ``"activations"``, or one of ``resources`` -> a share of the dense network in (0, 1], or
            an absolute amount above 1. MACs are those of one forward on the example input, activations the
            elements that it writes.
        amount: how much goes in one step, likewise; by default a tenth of the dense network in each resource
            of the budget.
        every_n_epochs: epochs between cuts.
        start_epoch: the first cut comes at the end of this epoch (Lightning counts from 0).
        criterion: scores the units; see :mod:`lightning_prune.criteria`. By default IPAD by weights alone.
        limits: how much of a layer or block may go.
        exclude: names or globs of layers, or of what holds them, whose filters stay.
        channel_multiple: layers that are cut keep a multiple of this many channels.
        resources: further resources by name, so that the budget may be in them; see
            :mod:`lightning_prune.resources`.
        optimizer: ``"reset"`` builds optimizers and schedulers anew after a cut, as IPAD does; ``"carry"``
            cuts their state along and goes on.
        statistics: gathered during the ``"epoch"`` that ends, over all its batches, or in a ``"pass"`` of its
            own over the training data, in eval mode. Under ``torch.compile``, which hooks cannot see into, it
            is always a pass.
        submodule: qualified name of the part to prune, if it is not the whole module. It must take the same
            input.
        recalibrate_batches: after a cut, estimate the running statistics of batch norms on this many training
            batches; by default 16 if no training follows, else 0, since the next epoch renews them.
        verbose: print one line per cut.

    Attributes:
        record: what has been removed so far, relative to the dense network; None before the first cut.
        history: the facts of every cut.

    Raises:
        ValueError: an argument is out of range; when fitting starts: a name matches nothing, the budget
            cannot be met, there is nothing to prune, or no example input is to be had. All before anything
            changes.

    Example:
        >>> callback = FilterPruningCallback(budget={"macs": 0.5}, every_n_epochs=2)
        >>> callback.rules.amount
        {'macs': 0.1}
    """

    def __init__(
        self,
        budget: Mapping[str, float],
        *,
        amount: Mapping[str, float] | None = None,
        every_n_epochs: int = 1,
        start_epoch: int = 1,
        criterion: Criterion = BY_WEIGHT,
        limits: Limits = THREE_QUARTERS,
        exclude: Sequence[str] = (),
        channel_multiple: int = 1,
        resources: Mapping[str, Resource] | None = None,
        optimizer: OptimizerMode = "reset",
        statistics: StatisticsMode = "epoch",
        submodule: str | None = None,
        recalibrate_batches: int | None = None,
        verbose: bool = True,
    ) -> None:
        check_choice("optimizer", optimizer, get_args(OptimizerMode))
        check_choice("statistics", statistics, get_args(StatisticsMode))
        if every_n_epochs < 1 or start_epoch < 0:
            given = f"{every_n_epochs} and {start_epoch}"
            raise ValueError(f"need every_n_epochs >= 1 and start_epoch >= 0, got {given}")
        amount = dict.fromkeys(budget, STEP) if amount is None else dict(amount)
        self.rules = Rules(dict(budget), amount, limits, exclude, channel_multiple, dict(resources or {}))
        self.criterion = criterion
        self.every_n_epochs, self.start_epoch = every_n_epochs, start_epoch
        self.optimizer, self.statistics, self.submodule = optimizer, statistics, submodule
        self.recalibrate_batches, self.verbose = recalibrate_batches, verbose
        self.record: PruningRecord | None = None
        self.history: list[Cut] = []
        self._dense: DenseSizes | None = None
        self._reset_pending = False
        self._ended = -1  # the last epoch whose end was dealt with
        self._run: Run | None = None
        self._resumption = Resumption()
        self._taken_up: Mapping[str, Any] | None = None

    @property
    def within_budget(self) -> bool:
        """Whether the network, as it is in training now, meets the budget."""
        return self._run is not None and self.rules.met(self._run.graph, self._run.dense)

    @property
    def finished(self) -> bool:
        """Whether there will be no more cuts: the budget is met, or nothing is left to remove."""
        return self.within_budget or (self._run is not None and self._run.exhausted)

    @property
    def last_cut(self) -> int:
        """The epoch that ended with the last cut; -1 before the first."""
        return self.history[-1].epoch if self.history else -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Arrange that a pruned checkpoint finds a network of its shape."""
        check_strategy(trainer)
        self._resumption, self._taken_up = Resumption(), None
        before_loading(pl_module, lambda checkpoint: self._shrink(trainer, pl_module, checkpoint))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what is wrong with names and budget before training starts."""
        self._resumption.on_fit_start(trainer)
        target_of(pl_module, self.submodule)
        if pl_module.example_input_array is not None:
            self._start(trainer, pl_module, as_example(pl_module.example_input_array))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what would hang, and go on where the checkpoint was written."""
        check_batches(trainer)
        self._resumption.on_train_start(trainer)
        if (state := self._taken_up) is not None:
            run = self._run or self._start(trainer, pl_module, same_shapes(state["example"]))
            run.take_up(state, self.criterion)
            self._taken_up = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a cut, go on with fresh optimizers and schedulers."""
        before, missed = trainer.current_epoch - 1, self._resumption.between_epochs
        self._resumption.on_train_epoch_start(trainer)
        if missed and self._run and self._due(trainer, before, self._run):
            self._prune(trainer, self._run, before)  # the checkpoint was written before the epoch's cut
        if self._reset_pending:
            fresh_optimizers_(trainer)
            self._reset_pending = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the input once, and at the activations if the epoch ends with a cut."""
        run = self._run
        if run is None:
            run = self._start(trainer, pl_module, first_sample(batch, target_of(pl_module, self.submodule)))
        if (
            not self._in_a_pass(run)
            and run.collector is None
            and self._due(trainer, trainer.current_epoch, run)
        ):
            run.collect(self.criterion)
        run.watch(True)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients, unscaled and not clipped yet."""
        if self._run:
            self._run.stepping(optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Whatever runs between training batches (validation, say) does not count."""
        if self._run:
            self._run.watch(False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune if it is time, and log what there is."""
        self._resumption.on_train_epoch_end(trainer)
        if self._run:
            if self._due(trainer, trainer.current_epoch, self._run):
                self._prune(trainer, self._run, trainer.current_epoch)
            self._ended = trainer.current_epoch
            pl_module.log_dict(facts(self._run.graph, self._run.dense))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the budget was not met."""
        run = self._run
        if run and not self.rules.met(run.graph, run.dense):
            rank_zero_warn(unmet(self.rules, run.graph, run.dense, run.last))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An empty loader makes Lightning stop in silence; do not."""
        self._resumption.on_fit_end(trainer)
        if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
            raise ValueError(
                "the training data loader has no batches: nothing was trained and nothing pruned"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        before_loading(pl_module, None)
        if self._run:
            self._run.forget()
        self._run = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hooks behind."""
        self.teardown(trainer, pl_module, "exception")

    def state_dict(self) -> dict[str, Any]:
        """What has been done so far, as plain numbers."""
        return {
            "record": self.record.to_dict() if self.record else None,
            "dense": self._dense.to_dict() if self._dense else None,
            "history": [asdict(cut) for cut in self.history],
            "reset_pending": self._reset_pending,
            "ended": self._ended,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The network itself was cut before its weights were loaded."""
        record, dense = state_dict["record"], state_dict["dense"]
        self.record = PruningRecord.from_dict(record) if record else None
        if dense:  # Lightning's tuners put back the state from before the first trace
            self._dense = DenseSizes.from_dict(dense)
        self.history = [Cut(**cut) for cut in state_dict["history"]]
        self._reset_pending, self._ended = state_dict["reset_pending"], state_dict["ended"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the record where whoever loads the weights finds it, and what it takes to go on."""
        saved = self._saved()
        saved["runs"] = gathered(self._run.state() if self._run else None)
        saved["resume"] = self._resumption.save(trainer)
        checkpoint[CHECKPOINT_KEY] = saved

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Training goes on where the checkpoint was written; to test, weights and record are enough."""
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        if trainer.state.fn == TrainerFn.FITTING and "resume" in saved:
            self._resumption.load(trainer, saved["resume"], checkpoint)
            runs = saved["runs"]
            self._taken_up = runs[trainer.global_rank] if len(runs) == trainer.world_size else None

    def _saved(self) -> dict[str, Any]:
        return {"record": self.record.to_dict() if self.record else None, "submodule": self.submodule}

    def _shrink(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Cut the network to a checkpoint's record before the weights arrive, and its averages."""
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        if saved.get("record") is not None:
            record, submodule = PruningRecord.from_dict(saved["record"]), saved["submodule"]
            copies, target = averages(trainer, pl_module), part_of(pl_module, submodule or "")
            if not has_shapes_of(target, record):
                check_weights(pl_module, target, record, checkpoint["state_dict"], strict=False)
            shrink_(target, record)
            for copy in copies:
                shrink_(copy.module, copy.part(record, submodule))
            self.record = record
            carry_along(pl_module, {CHECKPOINT_KEY: self._saved()})

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example) -> Run:
        """Trace, and check everything that can be checked."""
        target = target_of(pl_module, self.submodule)
        check_target(target)
        averages(trainer, pl_module)  # what is wrong with them shows before anything is trained
        example = trainer.precision_plugin.convert_input(move_data_to_device(example, pl_module.device))
        graph = self.rules.traced(target, example)
        if self.record is None:
            self.rules.check(graph)
            self._dense = DenseSizes.of(graph)
            foreseen = self.rules.foreseen(graph, target)
            if not foreseen.reached:
                rank_zero_warn(f"the limits may stop pruning above the budget: {foreseen}")
        shapes = self.record.shapes if self.record else {}
        dense = (self._dense or DenseSizes.of(graph)).completed(graph, shapes)
        self._run = Run(target, example, graph, dense, is_compiled(pl_module))
        return self._run

    def _due(self, trainer: L.Trainer, epoch: int, run: Run) -> bool:
        """Whether ``epoch`` ends with a cut that was not made yet."""
        since = epoch - self.start_epoch
        on_time = since >= 0 and since % self.every_n_epochs == 0 and epoch > self._ended
        return (
            on_time
            and not swa_is_over(trainer)
            and not run.exhausted
            and not self.rules.met(run.graph, run.dense)
        )

    def _prune(self, trainer: L.Trainer, run: Run, epoch: int) -> None:
        """One cut, and what has to follow it."""
        start = time.perf_counter()
        if self._in_a_pass(run):
            self._observe(trainer, run)
        carried = trainer.optimizers if self.optimizer == "carry" else ()
        before, copies = run.graph, averages(trainer, trainer.lightning_module)
        record = run.cut_(self.rules, self.criterion, carried)
        if not record or run.last is None:
            return
        self.record = record if self.record is None else self.record.then(record)
        carry_along(trainer.lightning_module, {CHECKPOINT_KEY: self._saved()})
        for copy in copies:
            copy.part(record, self.submodule).apply_(copy.module)
        self._follow(trainer, run, copies)
        cut = Cut.of(before, run.last, epoch, time.perf_counter() - start)
        self.history.append(cut)
        self._say(trainer, f"{cut} · {run.last.ending}" if run.exhausted else str(cut))

    def _in_a_pass(self, run: Run) -> bool:
        """Whether activations are looked at in a pass of its own; gradients never are: training makes them."""
        return (self.statistics == "pass" or run.compiled) and gathers(self.criterion) is None

    def _observe(self, trainer: L.Trainer, run: Run) -> None:
        """Gather statistics in a pass of its own."""
        if run.collect(self.criterion):
            with torch.no_grad(), switched(run.target, lambda module: False), forward_context(trainer):
                for args, kwargs in train_inputs(trainer, run.target):
                    run.target(*args, **kwargs)

    def _follow(self, trainer: L.Trainer, run: Run, copies: Sequence[Average]) -> None:
        """Optimizers, wrapper and norms follow the smaller network."""
        if self.optimizer == "reset":
            # The fresh ones come with the next epoch: Lightning still steps the schedulers of this one.
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
            self._reset_pending = True
        rebuild_wrapper_(trainer)
        number = self.recalibrate_batches
        if number is None:
            number = RECALIBRATION if is_last_epoch(trainer) else 0
        if number:
            renew_norms_(trainer, [run.target, *counterparts(copies, self.submodule)], number)

    @rank_zero_only
    def _say(self, trainer: L.Trainer, line: str) -> None:
        if self.verbose:
            bar = trainer.progress_bar_callback
            shown = bar is not None and getattr(bar, "is_enabled", True)
            (bar.print if bar is not None and shown else print)(line)


def pruning_callbacks(trainer: L.Trainer) -> list[FilterPruningCallback]:
    """Those that are in charge of ``trainer``'s network."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, FilterPruningCallback)]
