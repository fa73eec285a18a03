"""Cuts at regular moments: when they are due, what is observed for them, and how much each removes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch.optim import Optimizer

from lightning_prune.criteria.base import CriterionLike
from lightning_prune.pruning.schedules import Schedule, Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.budget import check_amounts
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.passing import PassingFailure

__all__ = ["RegularCuts", "StatisticsMode", "missing_cuts", "retry_is_due", "with_amount"]

StatisticsMode = Literal["epoch", "pass"]
DEFAULT_AMOUNT = 0.1  # of the dense network, per cut


@dataclass(frozen=True)
class RegularCuts:
    """Removes the least important filters at regular moments, each time a fixed amount or what a schedule says.

    Attributes:
        policy: what must remain and what may be removed.
        timing: when cuts are due.
        criterion: scores the units.
        statistics: collected during the ``"epoch"`` that ends with a cut, or in a ``"pass"`` of its own over the
            training data.
    """

    policy: PruningPolicy
    timing: Timing
    criterion: CriterionLike
    statistics: StatisticsMode = "epoch"

    def needs_pass(self, session: PruningSession) -> bool:
        """Whether statistics come from a separate pass. Gradients never do, since only training computes them."""
        is_separate = self.statistics == "pass" or session.compiled
        return is_separate and not session.needs_steps(self.criterion)

    def criterion_to_observe(self, session: PruningSession, now: int) -> CriterionLike | None:
        """Return the criterion during the epoch, or interval of steps, that a cut ends; None: observe nothing."""
        is_observed = self.timing.is_observed(now) or session.owed is not None
        return self.criterion if is_observed and not self.needs_pass(session) else None

    def is_due(self, now: int, last: int) -> bool:
        """Return whether there is a cut after ``last``, the last moment that was dealt with, and up to ``now``."""
        since = last if self.timing.by_steps else max(last, now - 1)
        return self.timing.due(since, now)

    def is_finished(self, session: PruningSession) -> bool:
        """Return whether there will be no more cuts."""
        return self.policy.is_met(session.graph, session.dense) or session.exhausted

    def cut_(
        self, session: PruningSession, now: int, optimizers: Sequence[Optimizer], run_data: Callable[[], None]
    ) -> PruningRecord:
        """Make the cut that is due at ``now``, after a pass over the training data if statistics need one.

        Right after a resume with another number of processes there are no statistics: the cut is postponed.

        Args:
            session: the network.
            now: the moment of the cut.
            optimizers: their state is cut along.
            run_data: runs the network over the training data once, in eval mode and without gradients.
        """
        if self.needs_pass(session):
            if session.observe(self.criterion):
                run_data()
        elif session.observer is None and session.observe(self.criterion):
            session.stop_observing()
            session.postpone(now, PassingFailure("no batch was observed since training was resumed"))
            return PruningRecord()
        policy = replace(self.policy, removed_share=self.timing.share(now))
        return session.cut_(policy, self.criterion, optimizers, now)


def retry_is_due(session: PruningSession, timing: Timing, now: int) -> bool:
    """Return whether a cut that failed for a reason that may pass is to be tried again at ``now``.

    It is tried at the end of the next epoch, or after as many steps as lie between two cuts.
    """
    wait = timing.every if timing.by_steps else 1
    return session.owed is not None and now >= session.owed + wait


def with_amount(
    policy: PruningPolicy, amount: Mapping[str, float] | None, schedule: Schedule | None
) -> PruningPolicy:
    """Return the policy with what is removed in one cut: by default a tenth in each resource of the budget.

    Raises:
        ValueError: both an amount and a schedule, or two amounts, are given.

    Example:
        >>> with_amount(PruningPolicy({"macs": 0.5}), None, None).amount
        {'macs': 0.1}
    """
    if amount is not None and policy.amount is not None:
        raise ValueError("amount: set this in the PruningPolicy, not beside it")
    amount = amount if policy.amount is None else policy.amount
    if amount is not None:
        check_amounts(amount, "amount")
    if schedule is not None and amount is not None:
        raise ValueError(
            "a schedule sets how much is removed in each cut, and so does an amount: leave one of them out"
        )
    return replace(policy, amount=dict(amount or dict.fromkeys(policy.budget, DEFAULT_AMOUNT)))


def missing_cuts(policy: PruningPolicy, timing: Timing, epochs: int) -> str:
    """Return a sentence if the cuts of a training are too few for its budget; "" if they suffice or are not fixed.

    Args:
        policy: its amounts and budgets that are shares are compared.
        timing: when cuts are due.
        epochs: number of epochs; negative: no end.

    Example:
        >>> policy = PruningPolicy({"macs": 0.5}, amount={"macs": 0.1})
        >>> print(missing_cuts(policy, Timing(), epochs=3))
        3 epochs have 2 cuts, macs needs 5: about 80% will remain, not 50%; train 6 epochs, or raise amount to 0.25
    """
    cuts = 0 if timing.by_steps or timing.schedule is not None else timing.number(epochs - 1) + 1
    for resource, target in policy.budget.items():
        amount = (policy.amount or {}).get(resource, 0)
        if not (0 < amount <= 1 and target < 1 and cuts > 0):
            continue
        needed = math.ceil((1 - target) / amount - 1e-9)
        if needed > cuts:
            enough = timing.start + timing.every * (needed - 1) + 1
            larger = math.ceil((1 - target) / cuts * 100 - 1e-9) / 100
            return (
                f"{counted(epochs, 'epoch')} {'has' if epochs == 1 else 'have'} {counted(cuts, 'cut')}, "
                f"{resource} needs {needed}: about {1 - cuts * amount:.0%} will "
                f"remain, not {target:.0%}; train {enough} epochs, or raise amount to {larger}"
            )
    return ""
