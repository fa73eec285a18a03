"""Compare the candidates of a round: how much each lost, and which one is kept."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_prune.compensation.calibration import CompensationError
from lightning_prune.netadapt.candidate import (
    CALIBRATION_BATCHES,
    Candidate,
    CandidateContext,
    CandidateResult,
)
from lightning_prune.netadapt.repair import RoundRepair, SearchRepair
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.workers import Workers, num_threads, pack_context, run_candidates
from lightning_prune.pruning.training import Training
from lightning_prune.selection.plan import Plan
from lightning_prune.utils.example_inputs import Example, on_device

__all__ = ["CandidateRanking"]


@dataclass(frozen=True)
class CandidateRanking:
    """Computes candidates of ``model`` in its current state, and compares them.

    Attributes:
        model: the network that is searched.
        example: positional and keyword inputs of its forward.
        training: how candidates are trained and evaluated.
        rounds: the number of steps of each candidate, and how they are compared.
        workers: where candidates are computed.
        resource: that the search reduces.
        repair: how candidates are repaired after their cut; None: they are not.
    """

    model: nn.Module
    example: Example
    training: Training
    rounds: Rounds
    workers: Workers
    resource: str
    repair: SearchRepair | None = None

    def batches(self, number: int) -> list[Any]:
        """Return the batches of a round: the next ones of the training data, which is repeated when it ends."""
        data, per_round = self.training.batches, max(self.rounds.steps * self.training.accumulate, 1)
        first = (number - 1) * per_round
        return [data[(first + i) % len(data)] for i in range(max(per_round, CALIBRATION_BATCHES))]

    def best(
        self, plans: Mapping[str, Plan], before: float, results: Iterator[CandidateResult]
    ) -> tuple[CandidateResult, dict[str, float]]:
        """Return the best result, and the metric of each candidate. Only the best weights are held in memory.

        Args:
            plans: name -> plan of each candidate, in the order of their indices.
            before: the metric of the network.
            results: of the candidates, in any order.

        Raises:
            RuntimeError: all of them failed.
        """
        names, metrics = list(plans), dict[str, float]()
        best, best_rank = None, (math.inf, 0)
        for result in results:
            name = names[result.index]
            metrics[name] = result.metric
            if not math.isfinite(result.metric):
                reason = result.error or f"its metric is {result.metric}"
                warnings.warn(f"the candidate of block {name!r} is dropped: {reason}", stacklevel=4)
                continue
            # The index decides between equal candidates, so that the order of the results has no influence.
            rank = self._loss(result.metric, before, plans[name]), result.index
            if best is None or rank < best_rank:
                best, best_rank = result, rank
        if best is None:
            raise RuntimeError(
                "all candidates of the round failed, see the warnings; the network is the one after the last round"
            )
        return best, {name: metrics[name] for name in names}

    def results(
        self, candidates: Sequence[Candidate], batches: Sequence[Any], state: dict[str, Any] | None
    ) -> Iterator[CandidateResult]:
        """Yield the results of candidates that are trained on ``batches`` with an optimizer in this ``state``."""
        return run_candidates(
            self._packed_context(batches, state, self._round_repair()), candidates, self.workers
        )

    def result(
        self, candidate: Candidate, batches: Sequence[Any], state: dict[str, Any] | None
    ) -> CandidateResult:
        """Return the result of a single candidate, computed by the first worker."""
        context = self._packed_context(batches, state, self._round_repair() if candidate.remove else None)
        (result,) = run_candidates(context, [candidate], replace(self.workers, n_jobs=1))
        return result

    def current_metric(self, state: dict[str, Any] | None) -> float:
        """Evaluate the network before it is pruned.

        Raises:
            ValueError: the metric is NaN or infinite.
        """
        metric = self.result(Candidate(0, "the network", (), self.rounds.seed), [], state).metric
        if not math.isfinite(metric):
            raise ValueError(f"the metric of the network is {metric} before anything was pruned")
        return metric

    def is_tolerable(self, before: float, result: CandidateResult) -> bool:
        """Return whether a candidate is at most by the tolerance worse than ``before``; warn if it failed."""
        if not math.isfinite(result.metric):
            warnings.warn(f"an alignment is dropped: {result.error or result.metric}", stacklevel=4)
            return False
        return self.rounds.tolerance is None or self._drop(result.metric, before) <= self.rounds.tolerance

    def _loss(self, metric: float, before: float, plan: Plan) -> float:
        """Return the quantity by which candidates are compared; lower is better."""
        drop = self._drop(metric, before)
        if self.rounds.by == "metric" or drop <= 0:
            return drop
        change = plan.costs[self.resource]
        return drop * change.dense / max(change.before - change.after, 1)

    def _drop(self, metric: float, before: float) -> float:
        """Return by how much a metric is worse than before."""
        return (before - metric) if self.training.higher_is_better else (metric - before)

    def _packed_context(
        self, batches: Sequence[Any], state: dict[str, Any] | None, repair: RoundRepair | None
    ) -> Any:
        model, training = copy.deepcopy(self.model).cpu(), replace(self.training, batches=batches)
        example = on_device(self.example, torch.device("cpu"))
        return pack_context(CandidateContext(model, example, training, state, self.rounds.steps, repair))

    def _round_repair(self) -> RoundRepair | None:
        """Return the repair of candidates of the present network; None, with a warning, if there are no images."""
        if self.repair is None:
            return None
        model = copy.deepcopy(self.model).to(self.workers.device(0))
        try:
            with num_threads(self.workers.threads):  # the same bits in every process
                return self.repair.of_round(model)
        except CompensationError as error:
            warnings.warn(f"candidates are not repaired: {error}", stacklevel=5)
            return None
