"""``FilterPruningCallback``: says when to prune; the engine says how (level 4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.base import PruningCallbackBase
from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.ipad import IPAD
from lightning_prune.graph.channel_graph import ChannelGraph, Resource
from lightning_prune.pruning.cut_summary import CutSummary, facts, unmet
from lightning_prune.pruning.schedules import Schedule, timing_of
from lightning_prune.pruning.session import PruningSession, gathers
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.trainer.batches import first_sample, forward_training_data
from lightning_prune.trainer.checks import check_batches, check_record, check_timing, check_trained
from lightning_prune.trainer.retraining import OptimizerMode, Retraining
from lightning_prune.trainer.training_state import callbacks_of, is_compiled, print_line, target_of
from lightning_prune.trainer.weight_averaging import (
    AveragedCopy,
    averaged_copies,
    check_no_average_inside,
    submodules_in_copies,
    swa_has_ended,
)
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.example_inputs import Example, as_example, same_shapes

__all__ = ["FilterPruningCallback", "pruning_callbacks"]


def dense_sizes(rules: PruningPolicy, graph: ChannelGraph, target: nn.Module) -> DenseSizes:
    """The sizes of a network that was not cut yet; warn if limits may stop pruning before its budget is met.

    Raises:
        ValueError: ``rules`` make no sense for this network.
    """
    rules.check(graph)
    foreseen = rules.foreseen(graph, target)
    if not foreseen.reached:
        rank_zero_warn(f"the limits may stop pruning above the budget: {foreseen}")
    return DenseSizes.of(graph)


StatisticsMode = Literal["epoch", "pass"]
STEP = 0.1
BY_WEIGHT = IPAD(omega=1.0)  # what the application varies over omega; docs/criteria.md has what keeps more
THREE_QUARTERS = Limits()


class FilterPruningCallback(PruningCallbackBase):
    """Removes filters at the end of chosen epochs or steps, for good, and lets training go on.

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
        every_n_steps: optimizer steps between cuts, which then come within epochs, instead of epochs.
        start_step: the first of them comes after this many steps; by default ``every_n_steps``.
        schedule: number of the cut -> share of what has to go that is gone after it, instead of an ``amount``;
            see :mod:`lightning_prune.pruning.schedules`.
        criterion: scores the units; see :mod:`lightning_prune.criteria`. By default IPAD by weights alone; LAMP kept
            more in `docs/criteria.md`.
        limits: how much of a layer or block may go.
        exclude: names or globs of layers, or of what holds them, whose filters stay.
        channel_multiple: layers that are cut keep a multiple of this many channels.
        resources: further resources by name, so that the budget may be in them; see
            :mod:`lightning_prune.graph.layer_costs`.
        optimizer: ``"reset"`` builds optimizers and schedulers anew after a cut, as IPAD does; ``"carry"``
            cuts their state along and goes on.
        final_phase: how training goes on when pruning is over, the budget met or nothing left to remove: a
            :class:`~lightning_prune.trainer.retraining.FinalPhase`, or a function of the module that returns what its
            ``configure_optimizers`` would.
        statistics: gathered during the ``"epoch"`` that ends, over all its batches (or over the steps since the
            last cut), or in a ``"pass"`` of its own over the training data, in eval mode. Under
            ``torch.compile``, which hooks cannot see into, it is always a pass.
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
        every_n_steps: int | None = None,
        start_step: int | None = None,
        schedule: Schedule | None = None,
        criterion: Criterion = BY_WEIGHT,
        limits: Limits = THREE_QUARTERS,
        exclude: Sequence[str] = (),
        channel_multiple: int = 1,
        resources: Mapping[str, Resource] | None = None,
        optimizer: OptimizerMode = "reset",
        final_phase: Callable[[L.LightningModule], Any] | None = None,
        statistics: StatisticsMode = "epoch",
        submodule: str | None = None,
        recalibrate_batches: int | None = None,
        verbose: bool = True,
    ) -> None:
        check_choice("statistics", statistics, get_args(StatisticsMode))
        timing = timing_of(every_n_epochs, start_epoch, every_n_steps, start_step, schedule)
        if schedule is not None and amount is not None:
            raise ValueError(
                "a schedule says how much goes in each cut, an amount does too: leave one of them out"
            )
        amount = dict.fromkeys(budget, STEP) if amount is None else dict(amount)
        self.rules = PruningPolicy(
            dict(budget), amount, limits, exclude, channel_multiple, dict(resources or {})
        )
        super().__init__(timing, Retraining(optimizer, final_phase, recalibrate_batches), submodule)
        self.criterion, self.statistics, self.verbose = criterion, statistics, verbose

    @property
    def within_budget(self) -> bool:
        """Whether the network, as it is in training now, meets the budget."""
        return self._run is not None and self.rules.met(self._run.graph, self._run.dense)

    @property
    def finished(self) -> bool:
        """Whether there will be no more cuts: the budget is met, or nothing is left to remove."""
        return self.within_budget or (self._run is not None and self._run.exhausted)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what is wrong with names and budget before training starts."""
        self._resumption.on_fit_start(trainer)
        self.retraining.set_end(trainer)
        target_of(pl_module, self.submodule)
        if pl_module.example_input_array is not None:
            self._start(trainer, pl_module, as_example(pl_module.example_input_array))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what would hang, and go on where the checkpoint was written."""
        check_batches(trainer)
        check_timing(trainer, self.timing, self._in_a_pass(is_compiled(pl_module)))
        self._resumption.on_train_start(trainer)
        if (state := self._taken_up) is not None:
            run = self._run or self._start(trainer, pl_module, same_shapes(state["example"]))
            run.take_up(state, self.criterion)
            self._taken_up = None
        if self.timing.by_steps:
            self._ended = trainer.global_step if self._ended < 0 else self._ended
            self._prune_if_due(trainer, trainer.global_step)  # the checkpoint may be from just before the cut

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After a cut, go on with fresh optimizers and schedulers."""
        before, missed = trainer.current_epoch - 1, self._resumption.between_epochs
        self._resumption.on_train_epoch_start(trainer)
        if missed and not self.timing.by_steps:
            self._prune_if_due(trainer, before)  # the checkpoint was written before the epoch's cut
        if self.finished:
            self.retraining.start_final_phase(trainer, trainer.current_epoch)
        self.retraining.rebuild_pending_(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the input once, and at the activations if the epoch, or the interval, ends with a cut."""
        run = self._run
        if run is None:
            run = self._start(trainer, pl_module, first_sample(batch, target_of(pl_module, self.submodule)))
        self.retraining.rebuild_pending_(trainer)
        if run.collector is None and self._gathering(trainer, run):
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
        """Whatever runs between training batches (validation, say) does not count. Prune if it is time."""
        if self._run:
            self._run.watch(False)
        if self.timing.by_steps:
            self._prune_if_due(trainer, trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The network is scored as it is now."""
        self._scored = self._scored or not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune if it is time, and log what there is."""
        self._resumption.on_train_epoch_end(trainer)
        if not self.timing.by_steps:
            self._prune_if_due(trainer, trainer.current_epoch)
        if self._run:
            pl_module.log_dict(facts(self._run.graph, self._run.dense))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the budget was not met."""
        run = self._run
        if run and not self.rules.met(run.graph, run.dense):
            rank_zero_warn(unmet(self.rules, run.graph, run.dense, run.last))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An empty loader makes Lightning stop in silence; do not."""
        self._resumption.on_fit_end(trainer)
        check_trained(trainer)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example) -> PruningSession:
        """Trace, and check everything that can be checked."""
        target = target_of(pl_module, self.submodule)
        check_no_average_inside(target)
        check_record(target, self.record)
        averaged_copies(trainer, pl_module)  # what is wrong with them shows before anything is trained
        example = trainer.precision_plugin.convert_input(move_data_to_device(example, pl_module.device))
        graph = self.rules.traced(target, example)
        if self.record is None:
            self._dense = dense_sizes(self.rules, graph, target)
        shapes = self.record.shapes if self.record else {}
        dense = (self._dense or DenseSizes.of(graph)).completed(graph, shapes)
        self._run = PruningSession(target, example, graph, dense, is_compiled(pl_module))
        return self._run

    def _to_go(self, trainer: L.Trainer, run: PruningSession) -> bool:
        """Whether there is something to cut, if it is time."""
        return not (swa_has_ended(trainer) or run.exhausted or self.rules.met(run.graph, run.dense))

    def _gathering(self, trainer: L.Trainer, run: PruningSession) -> bool:
        """Whether the batch that begins is looked at for the next cut."""
        now = trainer.global_step if self.timing.by_steps else trainer.current_epoch
        looking = self.timing.gathering(now) and not self._in_a_pass(run.compiled)
        return looking and self._to_go(trainer, run)

    def _due(self, trainer: L.Trainer, now: int, run: PruningSession) -> bool:
        """Whether there is a cut at ``now`` that was not made yet."""
        before = self._ended if self.timing.by_steps else max(self._ended, now - 1)
        return self.timing.due(before, now) and self._to_go(trainer, run)

    def _prune_if_due(self, trainer: L.Trainer, now: int) -> None:
        """Prune at the end of the epoch ``now``, or after as many steps, unless that was done already."""
        if self._run and self._due(trainer, now, self._run):
            self._prune(trainer, self._run, now)
        if self._run:
            self._ended = now

    def _prune(self, trainer: L.Trainer, run: PruningSession, now: int) -> None:
        """One cut, and what has to follow it."""
        start = time.perf_counter()
        if self._in_a_pass(run.compiled) and run.collect(self.criterion):
            forward_training_data(trainer, run.target)
        before, copies = run.graph, averaged_copies(trainer, trainer.lightning_module)
        rules = replace(self.rules, gone=self.timing.share(now))
        record = run.cut_(rules, self.criterion, self.retraining.optimizers_to_cut(trainer))
        if not record or run.last is None:
            return
        self._take(trainer, record, copies)
        epoch, step = (trainer.current_epoch, now) if self.timing.by_steps else (now, None)
        self._follow(trainer, run, copies, epoch)
        cut = CutSummary.of(before, run.last, epoch, time.perf_counter() - start, step)
        self.history.append(cut)
        if self.verbose:
            print_line(trainer, f"{cut} · {run.last.ending}" if run.exhausted else str(cut))

    def _follow(
        self, trainer: L.Trainer, run: PruningSession, copies: Sequence[AveragedCopy], epoch: int
    ) -> None:
        """Optimizers, wrapper and norms follow the smaller network."""
        if self.finished:
            self.retraining.start_final_phase(trainer, epoch + 1)
        self.retraining.adapt_trainer_(
            trainer, [run.target, *submodules_in_copies(copies, self.submodule)], epoch
        )

    def _in_a_pass(self, compiled: bool) -> bool:
        """Whether activations are looked at in a pass of its own; gradients never are: training makes them."""
        return (self.statistics == "pass" or compiled) and gathers(self.criterion) is None


def pruning_callbacks(trainer: L.Trainer) -> list[FilterPruningCallback]:
    """Those that are in charge of ``trainer``'s network."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, FilterPruningCallback)]
