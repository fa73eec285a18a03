"""Prune by a criterion at regular moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.methods.base import PruningMethod
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.trainer.batches import forward_training_data
from lightning_prune.trainer.checks import check_timing
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.passing import PassingFailure

__all__ = ["FilterPruning", "StatisticsMode"]

StatisticsMode = Literal["epoch", "pass"]


class FilterPruning(PruningMethod):
    """Removes the least important filters at regular moments, each time a fixed amount or what a schedule says.

    Args:
        policy: what must remain and what may be removed.
        timing: when cuts are due.
        criterion: scores the units.
        statistics: see :class:`~lightning_prune.FilterPruningCallback`.
    """

    def __init__(
        self, policy: PruningPolicy, timing: Timing, criterion: CriterionLike, statistics: StatisticsMode
    ) -> None:
        check_choice("statistics", statistics, get_args(StatisticsMode))
        super().__init__(policy, timing, criterion)
        self.statistics = statistics

    def criterion_to_observe(self, trainer: L.Trainer, session: PruningSession) -> CriterionLike | None:
        """Return the criterion during the epoch, or interval of steps, that a cut ends."""
        now = trainer.global_step if self.timing.by_steps else trainer.current_epoch
        is_observed = self.timing.is_observed(now) or session.owed is not None
        is_observing = is_observed and self.may_cut(trainer, session)
        return self.criterion if is_observing and not self._needs_pass(session) else None

    def is_due(self, trainer: L.Trainer, session: PruningSession, now: int, last: int) -> bool:
        """Return whether the timing has a cut after ``last`` and up to ``now``, and there is something to remove."""
        since = last if self.timing.by_steps else max(last, now - 1)
        return self.timing.due(since, now) and self.may_cut(trainer, session)

    def cut_(
        self,
        trainer: L.Trainer,
        session: PruningSession,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> PruningRecord:
        """Make the cut that is due at ``now``, after a pass over the training data if statistics need one.

        Right after a resume with another number of processes there are no statistics: the cut is postponed.
        """
        if self._needs_pass(session):
            if session.observe(self.criterion):
                forward_training_data(trainer, session.target)
        elif session.observer is None and session.observe(self.criterion):
            session.stop_observing()
            session.postpone(now, PassingFailure("no batch was observed since training was resumed"))
            return PruningRecord()
        policy = replace(self.policy, removed_share=self.timing.share(now))
        return session.cut_(policy, self.criterion, optimizers, now)

    def on_first_batch(self, trainer: L.Trainer, session: PruningSession, batch: Any) -> None:
        """Check that cuts come when they are meant to."""
        check_timing(trainer, self.timing, self._needs_pass(session))

    def _needs_pass(self, session: PruningSession) -> bool:
        """Whether statistics come from a separate pass. Gradients never do, since only training computes them."""
        is_separate = self.statistics == "pass" or session.compiled
        return is_separate and not session.needs_steps(self.criterion)
