"""Prune by a criterion at regular moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.methods.base import PruningMethod
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.pruning.regular_cuts import RegularCuts, StatisticsMode, missing_cuts
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.trainer.batches import forward_training_data
from lightning_prune.trainer.checks import check_timing
from lightning_prune.utils.arguments import check_choice

__all__ = ["FilterPruning"]


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

    @property
    def cuts(self) -> RegularCuts:
        """The moments of cuts, and what each removes."""
        return RegularCuts(self.policy, self.timing, self.criterion, self.statistics)

    def criterion_to_observe(self, trainer: L.Trainer, session: PruningSession) -> CriterionLike | None:
        """Return the criterion during the epoch, or interval of steps, that a cut ends."""
        now = trainer.global_step if self.timing.by_steps else trainer.current_epoch
        return self.cuts.criterion_to_observe(session, now) if self.may_cut(trainer, session) else None

    def is_due(self, trainer: L.Trainer, session: PruningSession, now: int, last: int) -> bool:
        """Return whether the timing has a cut after ``last`` and up to ``now``, and there is something to remove."""
        return self.cuts.is_due(now, last) and self.may_cut(trainer, session)

    def cut_(
        self,
        trainer: L.Trainer,
        session: PruningSession,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> PruningRecord:
        """Make the cut that is due at ``now``, after a pass over the training data if statistics need one."""
        return self.cuts.cut_(
            session, now, optimizers, partial(forward_training_data, trainer, session.target)
        )

    def on_session_start(self, trainer: L.Trainer, session: PruningSession, is_dense: bool) -> None:
        """Tell, before training, that its epochs are too few for the budget."""
        if is_dense and (text := missing_cuts(self.policy, self.timing, trainer.max_epochs or -1)):
            rank_zero_info(text)

    def on_first_batch(self, trainer: L.Trainer, session: PruningSession, batch: Any) -> None:
        """Check that cuts come when they are meant to."""
        check_timing(trainer, self.timing, self.cuts.needs_pass(session))
