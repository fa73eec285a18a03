"""Candidates of one network against each other: what each has lost, and which one stays (level 3)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_prune.netadapt.candidate import Candidate, CandidateContext, CandidateResult
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.workers import Workers, packed, run
from lightning_prune.pruning.training import Training, on_device
from lightning_prune.selection.plan import Plan
from lightning_prune.utils.example_inputs import Example

__all__ = ["CALIBRATION", "CandidateRanking"]

#: batches that batch norms are estimated on, at least
CALIBRATION = 4


@dataclass(frozen=True)
class CandidateRanking:
    """Computes candidates of ``model`` as it is at the moment, and compares them.

    Attributes:
        model: the network that is searched.
        example: positional and keyword inputs of its forward.
        training: how candidates are trained and judged.
        rounds: how many steps each gets, and by what they are compared.
        workers: where candidates are computed.
        resource: that the search reduces.
    """

    model: nn.Module
    example: Example
    training: Training
    rounds: Rounds
    workers: Workers
    resource: str

    def batches(self, number: int) -> list[Any]:
        """Those of a round: the next ones, from the beginning again when they are through."""
        held, each = self.training.batches, max(self.rounds.steps * self.training.accumulate, 1)
        return [held[((number - 1) * each + i) % len(held)] for i in range(max(each, CALIBRATION))]

    def best(
        self, plans: Mapping[str, Plan], before: float, outcomes: Iterator[CandidateResult]
    ) -> tuple[CandidateResult, dict[str, float]]:
        """The outcome that stays, and the metric of each; only the best one's weights are kept meanwhile.

        Args:
            plans: of the candidates, by name, in the order of their numbers.
            before: the metric of the network.
            outcomes: of the candidates, in any order.

        Raises:
            RuntimeError: all of them failed.
        """
        names, metrics = list(plans), dict[str, float]()
        best, best_key = None, (math.inf, 0)
        for outcome in outcomes:
            name = names[outcome.index]
            metrics[name] = outcome.metric
            if not math.isfinite(outcome.metric):
                reason = outcome.error or f"its metric is {outcome.metric}"
                warnings.warn(f"the candidate of block {name!r} is dropped: {reason}", stacklevel=4)
                continue
            key = self._rank(outcome.metric, before, plans[name]), outcome.index
            if best is None or key < best_key:
                best, best_key = outcome, key
        if best is None:
            raise RuntimeError(
                "all candidates of the round failed; the network is as after the round before. See the warnings"
            )
        return best, {name: metrics[name] for name in names}

    def outcomes(
        self, several: Sequence[Candidate], batches: Sequence[Any], state: dict[str, Any] | None
    ) -> Iterator[CandidateResult]:
        """All candidates, trained on ``batches`` with an optimizer that goes on from ``state``."""
        return run(self._packed(batches, state), several, self.workers)

    def outcome(
        self, one: Candidate, batches: Sequence[Any], state: dict[str, Any] | None
    ) -> CandidateResult:
        """A candidate that has no rivals, on the first worker."""
        (found,) = run(self._packed(batches, state), [one], replace(self.workers, n_jobs=1))
        return found

    def judged(self, state: dict[str, Any] | None) -> float:
        """The metric of the network as it is.

        Raises:
            ValueError: it is no number.
        """
        metric = self.outcome(Candidate(0, "the network", (), self.rounds.seed), [], state).metric
        if not math.isfinite(metric):
            raise ValueError(f"the metric of the network is {metric} before anything was pruned")
        return metric

    def bears(self, before: float, outcome: CandidateResult) -> bool:
        """Whether a network is still as good as ``before``, but for what is tolerated."""
        if not math.isfinite(outcome.metric):
            warnings.warn(f"an alignment is dropped: {outcome.error or outcome.metric}", stacklevel=4)
            return False
        return self.rounds.tolerance is None or self._lost(outcome.metric, before) <= self.rounds.tolerance

    def _rank(self, metric: float, before: float, plan: Plan) -> float:
        """What is to be as low as possible."""
        lost = self._lost(metric, before)
        if self.rounds.by == "metric" or lost <= 0:
            return lost
        spent = plan.costs[self.resource]
        return lost * spent.dense / max(spent.before - spent.after, 1)

    def _lost(self, metric: float, before: float) -> float:
        return (before - metric) if self.training.higher_is_better else (metric - before)

    def _packed(self, batches: Sequence[Any], state: dict[str, Any] | None) -> Any:
        model, training = copy.deepcopy(self.model).cpu(), replace(self.training, batches=batches)
        example = on_device(self.example, torch.device("cpu"))
        return packed(CandidateContext(model, example, training, state, self.rounds.steps))
