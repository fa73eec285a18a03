"""``SlimmingCallback``: learns which channels to prune by a penalty on the scales of norms (level 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.criteria.base import Values
from lightning_prune.graph.channel_graph import Resource
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.limits import Limits
from lightning_prune.slimming.bias_folding import Folded, MeasuredShifts
from lightning_prune.slimming.policy import FixedScores, SlimmingPolicy, masked_share
from lightning_prune.slimming.scales import NormScales, check_arguments, loss_scale
from lightning_prune.trainer.batches import train_inputs
from lightning_prune.trainer.lightning_internals import may_stop_early
from lightning_prune.trainer.retraining import OptimizerMode
from lightning_prune.trainer.training_state import is_last_epoch
from lightning_prune.trainer.weight_averaging import (
    AveragedCopy,
    active_averages,
    averaged_copies,
    submodules_in_copies,
    swa_has_ended,
)
from lightning_prune.utils.distributed import gathered, shared
from lightning_prune.utils.example_inputs import Example

__all__ = ["SlimmingCallback"]

NO_LIMITS = Limits(layers=1.0)
RECALIBRATION = 16


class SlimmingCallback(FilterPruningCallback):
    """Pushes the scales of norms towards 0, expensive channels harder, and cuts what has arrived there.

    To the gradients of the chosen scales ``rho * p * sign(gamma)`` is added before each optimizer step, ``p`` being
    a channel's share in the costs (:func:`~lightning_prune.slimming.penalty.channel_costs`): as if the loss held
    ``rho * sum p |gamma|``, divided by nothing, once per step, before clipping. A unit is *masked* while all of its
    scales are at or below the threshold, in the model and in its moving average. When the masked units' MACs reach
    ``shrink_at``, they are cut at the end of the epoch, with moving averages and optimizer state. In the last epoch
    the moving average alone decides, and a budget, if there is one, is met exactly, smallest scales first. What a
    removed channel's shift still said is folded into what follows (:mod:`~lightning_prune.slimming.bias_folding`).

    Network slimming (Liu et al., ICCV 2017) as AtomNAS does it (Mei et al., ICLR 2020). Everything else is
    :class:`~lightning_prune.FilterPruningCallback`'s: proof, checkpoints, resuming, DDP, averages.

    The moving average is that of Lightning's ``WeightAveraging`` or any ``AveragedModel``, if there is one, else one
    of the scales that the callback keeps itself.

    Args:
        budget: what is to remain; shrinking and penalty end as soon as it is met, and in the last epoch it is met
            exactly. None: what the threshold says is all that goes.
        rho: of the penalty.
        by: whose costs make ``p``: ``"macs"``, ``"params"``, or any other resource that the graph counts.
        norms: names or globs of the norms to slim, or of what holds them; by default all that have a channel that
            may go. A unit with none of them stays.
        threshold: of ``|gamma|``.
        shrink_at: cut when the masked units have this share of the dense MACs.
        end_epoch: penalty and shrinking end with this epoch, and training goes on without; by default the last one.
        warmup_epochs: over which rho rises linearly from 0; or
        warmup_steps: likewise, optimizer steps.
        average_decay: of the moving average that the callback keeps itself, per optimizer step.
        limits, exclude, channel_multiple, resources, optimizer, submodule, recalibrate_batches, verbose: as of
            :class:`~lightning_prune.FilterPruningCallback`; by default there are no limits, optimizer state is cut
            along, and norms are recalibrated after every cut.

    Attributes:
        changes: of every cut, how much it changed the outputs on a training batch, in eval mode: ``||after - before||
            / ||before||``, after folding and before the recalibration.
        folded: of every cut, how many layers took up what they lost.

    Logged at the end of each epoch: ``prune/penalty`` (with rho), ``prune/rho``, ``prune/masked`` (share of the dense
    MACs before the cut) and, after a cut, ``prune/change``.

    Raises:
        ValueError: an argument is out of range; when fitting starts: a name matches no norm, there is no norm to
            slim, the threshold is above all scales, the resource is unknown, or the budget cannot be met. All
            before anything changes.

    Example:
        >>> slimming = SlimmingCallback(budget={"macs": 0.5}, rho=1e-3, norms=["*.bn2"], end_epoch=15)
        >>> slimming.rules.threshold
        0.001
    """

    rules: SlimmingPolicy

    def __init__(
        self,
        budget: Mapping[str, float] | None = None,
        *,
        rho: float = 1e-4,
        by: str = "macs",
        norms: Sequence[str] = (),
        threshold: float = 1e-3,
        shrink_at: float = 0.05,
        end_epoch: int | None = None,
        warmup_epochs: int = 0,
        warmup_steps: int = 0,
        average_decay: float = 0.9,
        limits: Limits = NO_LIMITS,
        exclude: Sequence[str] = (),
        channel_multiple: int = 1,
        resources: Mapping[str, Resource] | None = None,
        optimizer: OptimizerMode = "carry",
        submodule: str | None = None,
        recalibrate_batches: int = RECALIBRATION,
        verbose: bool = True,
    ) -> None:
        check_arguments(rho, threshold, shrink_at, average_decay, end_epoch, warmup_epochs, warmup_steps)
        super().__init__(
            budget or {},
            optimizer=optimizer,
            statistics="pass",  # there are none; the scales are looked at when an epoch ends
            submodule=submodule,
            recalibrate_batches=recalibrate_batches,
            verbose=verbose,
        )
        self.rules = SlimmingPolicy(
            dict(budget or {}),
            None,
            limits,
            exclude,
            channel_multiple,
            dict(resources or {}),
            threshold=threshold,
            norms=norms,
        )
        self.rho, self.by, self.shrink_at, self.end_epoch = rho, by, shrink_at, end_epoch
        self.warmup_epochs, self.warmup_steps, self.average_decay = warmup_epochs, warmup_steps, average_decay
        self.changes: list[float] = []
        self.folded: list[Folded] = []
        self._average: dict[str, Tensor] = {}
        self._closed = False  # the final shrink was made
        self._slim: NormScales | None = None
        self._warned = False
        self._measured: MeasuredShifts | None = None

    @property
    def within_budget(self) -> bool:
        """Whether the network meets the budget; without a budget, whether shrinking is over."""
        return super().within_budget if self.rules.budget else self._closed

    @property
    def finished(self) -> bool:
        """Whether there is no more penalty and no more shrinking."""
        return self._closed or super().finished

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was frozen, or no longer is, may have changed."""
        super().on_train_epoch_start(trainer, pl_module)
        self._slim = None
        if self._run is not None and not self.finished:
            self._slimmed(self._run)  # now: manual optimization freezes parts while others step

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient: gradients are unscaled, summed up over ranks and batches, not clipped yet."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._run is not None and not self.finished:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            slimmed, scaler = self._slimmed(self._run), getattr(trainer.precision_plugin, "scaler", None)
            # The average takes in what this step starts from; so no hook's order matters to a checkpoint.
            slimmed.follow_(self._average, held, self.average_decay)
            slimmed.penalty.add_(self._rho(trainer) * loss_scale(scaler, optimizer), held)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shrink if it is time, and log."""
        self._warn_of_idle_scales()
        seen, cuts = self._seen(trainer), len(self.history)
        super().on_train_epoch_end(trainer, pl_module)
        if len(self.history) > cuts:
            seen["prune/change"] = self.changes[-1]
        pl_module.log_dict(seen)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the last shrink was not made."""
        super().on_train_end(trainer, pl_module)
        if self._run is not None and not self.finished and not self.rules.budget:
            rank_zero_warn(
                "training was stopped before the last shrink, and channels that have faded are still there; set "
                "end_epoch, or stop with BudgetEarlyStopping, which waits for it"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        super().teardown(trainer, pl_module, stage)
        self._slim, self._warned = None, False

    def state_dict(self) -> dict[str, Any]:
        """What has been done so far, and the moving average."""
        folded = [[each.exact, each.nearly, each.lost] for each in self.folded]
        own = {
            "average": dict(self._average),
            "closed": self._closed,
            "changes": self.changes,
            "folded": folded,
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self._average, self._closed = dict(state_dict["average"]), state_dict["closed"]
        self.changes = list(state_dict["changes"])
        self.folded = [Folded(*counts) for counts in state_dict["folded"]]

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example) -> PruningSession:
        """Trace, and find what is wrong with norms and resource."""
        run = super()._start(trainer, pl_module, example)
        slimmed = self._slimmed(run)
        if self.record is None and not self._average:  # a resumed run is past its beginning
            slimmed.check_threshold(self.rules.threshold)
        return run

    def _slimmed(self, run: PruningSession) -> NormScales:
        """Scales and penalty of the network as it is now."""
        if self._slim is None or not self._slim.is_of(run):
            self._slim = NormScales(run, self.rules, self.by)
        return self._slim

    def _warn_of_idle_scales(self) -> None:
        """Say once that scales meet no optimizer, at the end of an epoch that was trained."""
        if self._run is None or self.finished or self._warned or not self.rho:
            return
        if message := self._slimmed(self._run).idle(self._average):
            self._warned = True
            rank_zero_warn(message)

    def _rho(self, trainer: L.Trainer) -> float:
        """As far as it has risen."""
        if self.warmup_steps:
            return self.rho * min(1.0, (trainer.global_step + 1) / self.warmup_steps)
        if not self.warmup_epochs:
            return self.rho
        batches, batch = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_idx + 1
        within = min(batch / batches, 1.0) if math.isfinite(batches) else 0.0
        return self.rho * min(1.0, (trainer.current_epoch + within) / self.warmup_epochs)

    def _is_last(self, trainer: L.Trainer, epoch: int) -> bool:
        """Whether shrinking ends with ``epoch``."""
        if self.end_epoch is not None and epoch >= self.end_epoch:
            return True
        by_steps = 0 <= trainer.max_steps <= trainer.global_step
        stops = trainer.should_stop and may_stop_early(trainer)
        return by_steps or stops or is_last_epoch(trainer, epoch)

    def _sizes(self, trainer: L.Trainer, run: PruningSession, final: bool) -> Values:
        """The size of each unit's scales, in the model or in its moving average; at last in the average alone."""
        copies = submodules_in_copies(active_averages(trainer, trainer.lightning_module), self.submodule)
        return self._slimmed(run).sizes(copies, self._average, with_own=not final)

    def _due(self, trainer: L.Trainer, now: int, run: PruningSession) -> bool:
        """Whether the epoch ``now`` ends with a shrink that was not made yet."""
        if now <= self._ended or self.finished or swa_has_ended(trainer):
            return False
        if self._is_last(trainer, now):
            return True
        plan = self.rules.plan(run.graph, self._sizes(trainer, run, final=False), run.dense)
        return shared(len(plan) > 0 and masked_share(plan) >= self.shrink_at)

    def _seen(self, trainer: L.Trainer) -> dict[str, float]:
        """What there is to log before a shrink."""
        if self._run is None or self.finished:
            return {"prune/rho": 0.0, "prune/penalty": 0.0, "prune/masked": 0.0}
        rho = self._rho(trainer)
        penalty = rho * float(self._slimmed(self._run).penalty.value())
        rules = replace(self.rules, final=False)
        plan = rules.plan(self._run.graph, self._sizes(trainer, self._run, final=False), self._run.dense)
        return {"prune/rho": rho, "prune/penalty": penalty, "prune/masked": masked_share(plan)}

    def _prune(self, trainer: L.Trainer, run: PruningSession, now: int) -> None:
        """Measure what will be lost, cut, and put it into what follows."""
        final = self._is_last(trainer, now)
        self.rules, self.criterion = (
            replace(self.rules, final=final),
            FixedScores(self._sizes(trainer, run, final)),
        )
        copies = submodules_in_copies(averaged_copies(trainer, trainer.lightning_module), self.submodule)
        plan = shared(self.rules.plan(run.graph, self.criterion.values, run.dense))
        if len(plan):
            example = next(islice(train_inputs(trainer, run.target), 1), None)
            networks, scales = [run.target, *copies], self._slimmed(run).scales
            self._measured = MeasuredShifts(networks, run.graph, scales, plan.remove, example)
        super()._prune(trainer, run, now)
        self._measured, self._closed = None, self._closed or final or self.within_budget

    def _follow(
        self, trainer: L.Trainer, run: PruningSession, copies: Sequence[AveragedCopy], epoch: int
    ) -> None:
        """Fold, then as after any cut."""
        measured = self._measured
        if measured is not None and run.last is not None:
            self._average = {
                n: measured.left(n, value, run.last.remove) for n, value in self._average.items()
            }
            self.folded.append(measured.fold_(run.last.remove))
            self.changes.append(sum(changes := gathered(measured.change())) / len(changes))
        super()._follow(trainer, run, copies, epoch)
