"""The strategy of a pruning callback: what to observe, when a cut is due, which units are removed, what follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_prune.criteria.base import CriterionLike
from lightning_prune.pruning.regular_cuts import retry_is_due
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.trainer.weight_averaging import swa_has_ended

__all__ = ["PruningMethod"]


class PruningMethod(ABC):
    """Decides for a :class:`~lightning_prune.callbacks.method_callback.PruningCallback`, which does everything else.

    The callback traces the network, verifies cuts or rolls them back, cuts moving averages along, rebuilds optimizers
    and wrappers, keeps everything in checkpoints, resumes and reports. It asks its method four questions:

    1. :meth:`criterion_to_observe`, before each training batch: whose statistics are to be collected now?
    2. :meth:`is_due`, at the end of each epoch or after each optimizer step: is it time for a cut?
    3. :meth:`cut_`: remove the units of this cut.
    4. :meth:`after_cut_`: what has to follow on the network and its averaged copies, before training continues?

    The other methods are called at the moments that their names say, and do nothing by default. ``session`` is the
    network between two cuts; ``now`` counts epochs, or optimizer steps if ``timing.by_steps``.

    Args:
        policy: what must remain of the network and what may be removed.
        timing: when cuts are due.
        criterion: scores the units.

    Example:
        A method of one's own must define these:

        >>> sorted(PruningMethod.__abstractmethods__)
        ['criterion_to_observe', 'cut_', 'is_due']
    """

    def __init__(self, policy: PruningPolicy, timing: Timing, criterion: CriterionLike) -> None:
        self.policy, self.timing, self.criterion = policy, timing, criterion

    @abstractmethod
    def criterion_to_observe(self, trainer: L.Trainer, session: PruningSession) -> CriterionLike | None:
        """Return the criterion whose observer has to see the batch that begins; None: observe nothing."""

    @abstractmethod
    def is_due(self, trainer: L.Trainer, session: PruningSession, now: int, last: int) -> bool:
        """Return whether to cut at ``now``; ``last`` is the last moment that was dealt with, -1 if there was none."""

    @abstractmethod
    def cut_(
        self,
        trainer: L.Trainer,
        session: PruningSession,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> PruningRecord:
        """Cut ``session.target`` and update ``session``.

        :meth:`PruningSession.cut_ <lightning_prune.pruning.session.PruningSession.cut_>` does both. A method that
        calls :func:`~lightning_prune.prune_` itself may remove units of ``session.graph.prunable`` only, and has to
        set ``session.graph = self.policy.trace(session.target, session.example)`` afterwards.

        Args:
            trainer: the trainer.
            session: the network.
            now: the moment of the cut.
            copies: averaged copies of the network, which the callback cuts afterwards by the record.
            optimizers: those whose state is cut along; none if they are built anew.

        Returns:
            What was removed; empty if nothing was.
        """

    def after_cut_(self, trainer: L.Trainer, session: PruningSession) -> None:
        """Adapt the smaller network and its averaged copies, before norms are estimated anew."""

    def may_cut(self, trainer: L.Trainer, session: PruningSession) -> bool:
        """Return whether there is something to remove, and averaging has not ended."""
        return not (swa_has_ended(trainer) or self.is_finished(session))

    def retries(self, trainer: L.Trainer, session: PruningSession, now: int) -> bool:
        """Return whether a cut that failed for a reason that may pass is to be tried again at ``now``.

        It is tried at the end of the next epoch, or after as many steps as lie between two cuts.
        """
        return retry_is_due(session, self.timing, now) and self.may_cut(trainer, session)

    def is_within_budget(self, session: PruningSession) -> bool:
        """Return whether the present network meets the budget."""
        return self.policy.is_met(session.graph, session.dense)

    def is_finished(self, session: PruningSession) -> bool:
        """Return whether there will be no more cuts."""
        return self.is_within_budget(session) or session.exhausted

    def setup(self, trainer: L.Trainer) -> None:
        """Prepare for fitting, before the data loaders are asked for."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the trainer before the first batch."""

    def on_session_start(self, trainer: L.Trainer, session: PruningSession, is_dense: bool) -> None:
        """Check the traced network; ``is_dense``: nothing was removed from it yet."""

    def on_first_batch(self, trainer: L.Trainer, session: PruningSession, batch: Any) -> None:
        """Check what can only be checked with a training batch and the loaders, before the first step."""

    def on_train_epoch_start(self, trainer: L.Trainer, session: PruningSession | None) -> None:
        """Begin an epoch."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, session: PruningSession, optimizer: Optimizer
    ) -> None:
        """Change gradients before ``optimizer`` steps; they are unscaled and not clipped yet."""

    def epoch_metrics(self, trainer: L.Trainer, session: PruningSession | None) -> dict[str, float]:
        """Return what to log at the end of an epoch, before its cut."""
        return {}

    def cut_metrics(self) -> dict[str, float]:
        """Return what to log of the last cut."""
        return {}

    def on_train_end(self, trainer: L.Trainer, session: PruningSession) -> None:
        """End training."""

    def teardown(self, trainer: L.Trainer) -> None:
        """Undo what :meth:`setup` did."""

    def forget(self) -> None:
        """Forget what belongs to the size that the network had before a checkpoint of another size was loaded."""

    def report(self, summary: str, session: PruningSession) -> str:
        """Return what to print after a cut, given the line that sums it up."""
        return (
            f"{summary} · {session.last_plan.ending}" if session.exhausted and session.last_plan else summary
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own state for checkpoints, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; ``state`` also holds the callback's entries."""
