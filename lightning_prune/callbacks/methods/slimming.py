"""Push the scales of norms towards 0 by a penalty, and cut the channels whose scales are small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.methods.base import PruningMethod
from lightning_prune.criteria.base import Values
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.slimming.bias_folding import Folded, MeasuredShifts
from lightning_prune.slimming.policy import FixedScores, SlimmingPolicy, masked_share
from lightning_prune.slimming.scales import NormScales, check_arguments, loss_scale
from lightning_prune.trainer.batches import train_inputs
from lightning_prune.trainer.lightning_internals import may_stop_early
from lightning_prune.trainer.training_state import is_last_epoch
from lightning_prune.trainer.weight_averaging import active_averages, submodules_in_copies, swa_has_ended
from lightning_prune.utils.distributed import broadcast, gather_all

__all__ = ["Slimming"]


class Slimming(PruningMethod):
    """Adds the penalty to the gradients, and cuts the channels whose scales are at or below the threshold.

    Args:
        policy: what may be removed, with the threshold.
        rho, by, shrink_at, end_epoch, warmup_epochs, warmup_steps, average_decay: see
            :class:`~lightning_prune.SlimmingCallback`.
        submodule: qualified name of the part that is pruned, to find it in averaged copies.

    Attributes:
        changes, folded: see :class:`~lightning_prune.SlimmingCallback`.
        is_closed: whether the final shrink was made.
    """

    policy: SlimmingPolicy

    def __init__(
        self,
        policy: SlimmingPolicy,
        *,
        rho: float,
        by: str,
        shrink_at: float,
        end_epoch: int | None,
        warmup_epochs: int,
        warmup_steps: int,
        average_decay: float,
        submodule: str | None,
    ) -> None:
        check_arguments(
            rho, policy.threshold, shrink_at, average_decay, end_epoch, warmup_epochs, warmup_steps
        )
        super().__init__(policy, Timing(), FixedScores(np.empty(0)))
        self.rho, self.by, self.shrink_at, self.end_epoch = rho, by, shrink_at, end_epoch
        self.warmup_epochs, self.warmup_steps, self.average_decay = warmup_epochs, warmup_steps, average_decay
        self.submodule = submodule
        self.changes: list[float] = []
        self.folded: list[Folded] = []
        self._average: dict[str, Tensor] = {}  # the moving average of the scales that the method keeps itself
        self._averaged_at = -1  # number of the last step before which the average was updated
        self.is_closed = False
        self._scales: NormScales | None = None
        self._warned = False
        self._shifts: MeasuredShifts | None = None
        self._last_change = math.nan

    def criterion_to_observe(self, trainer: L.Trainer, session: PruningSession) -> None:
        """Observe nothing: the scales are read when an epoch ends."""

    def is_due(self, trainer: L.Trainer, session: PruningSession, now: int, last: int) -> bool:
        """Return whether epoch ``now`` ends with a shrink: it is the last one, or enough channels are masked."""
        if now <= last or self.is_finished(session) or swa_has_ended(trainer):
            return False
        if self._is_last(trainer, now):
            return True
        plan = self.policy.plan(session.graph, self._sizes(trainer, session, final=False), session.dense)
        return broadcast(len(plan) > 0 and masked_share(plan) >= self.shrink_at)

    def cut_(
        self,
        trainer: L.Trainer,
        session: PruningSession,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> PruningRecord:
        """Measure the shifts that the cut takes away, and cut."""
        final = self._is_last(trainer, now)
        self.policy = replace(self.policy, final=final)
        self.criterion = FixedScores(self._sizes(trainer, session, final))
        plan = broadcast(self.policy.plan(session.graph, self.criterion.values, session.dense))
        if len(plan):
            example = next(islice(train_inputs(trainer, session.target), 1), None)
            networks, scales = [session.target, *copies], self._scales_of(session).scales
            self._shifts = MeasuredShifts(networks, session.graph, scales, plan.remove, example)
        record = session.cut_(self.policy, self.criterion, optimizers, now)
        if session.owed is not None:
            return record
        is_met = bool(self.policy.budget) and super().is_within_budget(session)
        self.is_closed = self.is_closed or final or is_met
        return record

    def after_cut_(self, trainer: L.Trainer, session: PruningSession) -> None:
        """Fold the removed channels' shifts into what follows, and measure how much the outputs changed."""
        shifts, self._shifts = self._shifts, None
        if shifts is not None and session.last_plan is not None:
            removed = session.last_plan.remove
            self._average = {
                name: shifts.kept_channels(name, value, removed) for name, value in self._average.items()
            }
            self.folded.append(shifts.fold_(removed))
            relative, of_variance = zip(*gather_all(shifts.changes()), strict=True)
            self.changes.append(sum(relative) / len(relative))
            self._last_change = sum(of_variance) / len(of_variance)

    def is_within_budget(self, session: PruningSession) -> bool:
        """Return whether the network meets the budget; without a budget, whether shrinking is over."""
        return super().is_within_budget(session) if self.policy.budget else self.is_closed

    def is_finished(self, session: PruningSession) -> bool:
        """Return whether there is no more penalty and no more shrinking."""
        return self.is_closed or super().is_finished(session)

    def on_session_start(self, trainer: L.Trainer, session: PruningSession, is_dense: bool) -> None:
        """Check norms, resource and threshold."""
        scales = self._scales_of(session)
        if is_dense and not self._average:  # else training resumes, and the scales are small by intention
            scales.check_threshold(self.policy.threshold)

    def on_train_epoch_start(self, trainer: L.Trainer, session: PruningSession | None) -> None:
        """Collect the scales again: parameters may have been frozen or unfrozen."""
        self._scales = None
        if session is not None and not self.is_finished(session):
            self._scales_of(session)  # now: under manual optimization parts are frozen while others step

    def on_before_optimizer_step(
        self, trainer: L.Trainer, session: PruningSession, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient: gradients are unscaled, summed over ranks and batches, not clipped yet."""
        if self.is_finished(session):
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scales, scaler = self._scales_of(session), getattr(trainer.precision_plugin, "scaler", None)
        # The average takes in the values before this step, so that a checkpoint is the same in any hook; only once,
        # since a step that an exception has ended is repeated.
        if trainer.global_step != self._averaged_at:
            scales.update_average_(self._average, parameters, self.average_decay)
            self._averaged_at = trainer.global_step
        scales.penalty.add_(self._current_rho(trainer) * loss_scale(scaler, optimizer), parameters)

    def epoch_metrics(self, trainer: L.Trainer, session: PruningSession | None) -> dict[str, float]:
        """Return rho, penalty and masked share before a shrink; warn once of scales that no optimizer moves."""
        if session is None or self.is_finished(session):
            return {"prune/rho": 0.0, "prune/penalty": 0.0, "prune/masked": 0.0}
        self._warn_of_idle_scales(session)
        rho = self._current_rho(trainer)
        penalty = rho * float(self._scales_of(session).penalty.value())
        policy = replace(self.policy, final=False)
        plan = policy.plan(session.graph, self._sizes(trainer, session, final=False), session.dense)
        return {"prune/rho": rho, "prune/penalty": penalty, "prune/masked": masked_share(plan)}

    def cut_metrics(self) -> dict[str, float]:
        """Return the change of the outputs by the last cut, after folding."""
        return {"prune/change": self._last_change}

    def on_train_end(self, trainer: L.Trainer, session: PruningSession) -> None:
        """Warn if the final shrink was not made."""
        if not self.is_finished(session) and not self.policy.budget:
            rank_zero_warn(
                "training stopped before the last shrink, and channels with small scales are still there; set "
                "end_epoch, or stop with BudgetEarlyStopping, which waits for it"
            )

    def teardown(self, trainer: L.Trainer) -> None:
        """Release the scales of this network."""
        self._scales, self._warned = None, False

    def forget(self) -> None:
        """Forget the moving average, and what cuts have changed."""
        self._average, self._averaged_at = {}, -1
        self.is_closed, self.changes, self.folded = False, [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the moving average of the scales, and what cuts have changed."""
        folded = [[counts.exact, counts.approximate, counts.lost] for counts in self.folded]
        return {
            "average": dict(self._average),
            "averaged_at": self._averaged_at,
            "closed": self.is_closed,
            "changes": self.changes,
            "folded": folded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._average, self.is_closed = dict(state["average"]), state["closed"]
        self._averaged_at = state.get("averaged_at", -1)
        self.changes = list(state["changes"])
        self.folded = [Folded(*counts) for counts in state["folded"]]

    def _scales_of(self, session: PruningSession) -> NormScales:
        """Return scales and penalty of the present network."""
        if self._scales is None or not self._scales.matches(session):
            self._scales = NormScales(session, self.policy, self.by)
        return self._scales

    def _warn_of_idle_scales(self, session: PruningSession) -> None:
        """Warn once, after the first epoch, if some scales belong to no optimizer."""
        if self._warned or not self.rho:
            return
        if message := self._scales_of(session).idle_warning(self._average):
            self._warned = True
            rank_zero_warn(message)

    def _current_rho(self, trainer: L.Trainer) -> float:
        """Return rho after its warm-up so far."""
        if self.warmup_steps:
            return self.rho * min(1.0, (trainer.global_step + 1) / self.warmup_steps)
        if not self.warmup_epochs:
            return self.rho
        batches, batch = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_idx + 1
        share_of_epoch = min(batch / batches, 1.0) if math.isfinite(batches) else 0.0
        return self.rho * min(1.0, (trainer.current_epoch + share_of_epoch) / self.warmup_epochs)

    def _is_last(self, trainer: L.Trainer, epoch: int) -> bool:
        """Whether shrinking ends with ``epoch``."""
        if self.end_epoch is not None and epoch >= self.end_epoch:
            return True
        all_steps_done = 0 <= trainer.max_steps <= trainer.global_step
        is_stopping = trainer.should_stop and may_stop_early(trainer)  # min_epochs and min_steps are over
        return all_steps_done or is_stopping or is_last_epoch(trainer, epoch)

    def _sizes(self, trainer: L.Trainer, session: PruningSession, final: bool) -> Values:
        """Return the size of each unit's scales in the model or its average; at last in the average alone."""
        copies = submodules_in_copies(active_averages(trainer, trainer.lightning_module), self.submodule)
        return self._scales_of(session).sizes(copies, self._average, include_model=not final)
