"""The rounds of a search, one after the other: what :func:`lightning_prune.netadapt.run.search` runs (level 3)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from lightning_prune.criteria.weights import L2
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.netadapt.alignment import surplus
from lightning_prune.netadapt.candidate import Candidate, CandidateResult
from lightning_prune.netadapt.ranking import CALIBRATION, CandidateRanking
from lightning_prune.netadapt.rounds import ALIGNED, Round, Rounds, SearchResult
from lightning_prune.netadapt.state import SearchState, plainly
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.step import importance_of
from lightning_prune.pruning.training import Training
from lightning_prune.selection.coupled_blocks import CoupledBlock, find_blocks
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.selection.prunable import removable_units
from lightning_prune.surgery.prune import prune_
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.hashing import batch_digest, json_digest, network_digest
from lightning_prune.utils.seeding import derive_seed, seeded

__all__ = ["ALONE", "CALIBRATION", "Search", "target_share"]

ALONE = Workers()


class Search:
    """A search under way: what :func:`search` keeps between two rounds."""

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        rules: PruningPolicy,
        training: Training,
        rounds: Rounds,
        workers: Workers,
    ) -> None:
        self.model, self.example, self.training = model, example, training
        self.rounds, self.resource = rounds, only(rules.budget)
        self.rules = replace(rules, amount=None)
        self.bar = False
        self.contest = CandidateRanking(model, example, training, rounds, workers, self.resource)
        graph = self._traced()
        self.dense = DenseSizes.of(graph)
        self.blocks = find_blocks(graph, rounds.blocks, rules.exclude)
        self.reductions = rounds.reductions(target_share(rules.budget, self.dense))
        if not len(training.batches):
            raise ValueError("there are no training batches for the candidates")
        self.rules.check(graph)
        self._check_first(graph)

    def run(
        self,
        optimizer: dict[str, Any] | None,
        folder: Path | None,
        report: Callable[[str], None],
        bar: bool = False,
    ) -> SearchResult:
        """All rounds, from the state in ``folder`` on if there is one; ``bar`` shows candidates on a terminal."""
        self.bar = bar
        progress = SearchState.begin(folder, self.model, self._settings(), optimizer)
        if progress.restore_(self.model, lambda: self.contest.judged(progress.optimizer)):
            report(f"going on after round {len(progress.rounds)}, from {folder}")
        while not self.rules.met(graph := self._traced(), self.dense):
            if not self._round_(graph, progress):
                warnings.warn(self._stuck(graph), stacklevel=3)
                break
            self._keep(progress, report)
        if self.rounds.align > 1 and not progress.is_over and self._align_(progress):
            self._keep(progress, report)
        reached = self.rules.met(self._traced(), self.dense)
        return SearchResult(progress.record, progress.rounds, reached, progress.optimizer)

    def _traced(self) -> ChannelGraph:
        return self.rules.traced(self.model, self.example)

    def _keep(self, progress: SearchState, report: Callable[[str], None]) -> None:
        progress.save(self.model)
        left = max(len(self.reductions) - len(progress.rounds), 0)
        report(
            progress.rounds[-1].line(self.resource, len(self.reductions))
            + to_go(left * sum(each.seconds for each in progress.rounds) / len(progress.rounds))
        )

    def _shown(
        self, outcomes: Iterator[CandidateResult], number: int, removable_units: int
    ) -> Iterator[CandidateResult]:
        """The same; on a terminal with a bar that goes away with the round."""
        disable = None if self.bar else True  # None: where nobody looks
        yield from tqdm(
            outcomes, f"round {number}", removable_units, leave=False, disable=disable, unit="candidate"
        )

    def _round_(self, graph: ChannelGraph, progress: SearchState) -> bool:
        """One round; False if there is nothing left to remove."""
        start, number = time.perf_counter(), len(progress.rounds) + 1
        batches = self.contest.batches(number)
        plans = self._plans(graph, number, batches)
        if not plans:
            return False
        before = self._metric(progress)
        several = [self._candidate(i, name, plan, number) for i, (name, plan) in enumerate(plans.items())]
        outcomes = self._shown(
            self.contest.outcomes(several, batches, progress.optimizer), number, len(several)
        )
        best, metrics = self.contest.best(plans, before, outcomes)
        won = list(plans)[best.index]
        plan, steps = plans[won], self.rounds.steps * len(plans)
        self._cut_(graph, plan.remove, best, progress)
        cost = {resource: spent.after for resource, spent in plan.costs.items()}
        share = {resource: spent.share for resource, spent in plan.costs.items()}
        facts = cost, share, len(plan), steps, time.perf_counter() - start
        progress.add(Round(number, won, before, best.metric, metrics, *facts))
        return True

    def _metric(self, progress: SearchState) -> float:
        """Of the network as it is."""
        return progress.rounds[-1].after if progress.rounds else self.contest.judged(progress.optimizer)

    def _candidate(self, index: int, name: str, remove: Iterable[int], number: int) -> Candidate:
        return Candidate(index, name, tuple(remove), derive_seed(self.rounds.seed, number, name))

    def _plans(self, graph: ChannelGraph, number: int, batches: Sequence[Any]) -> dict[str, Plan]:
        """What each block would lose: those that can give the whole reduction, or else those that can give any."""
        importance = self._importance(graph, number, batches)
        plans = dict(self._each(graph, importance, number))
        whole = {name: plan for name, plan in plans.items() if plan.stopped != "limits"}
        return whole or {name: plan for name, plan in plans.items() if len(plan)}

    def _importance(self, graph: ChannelGraph, number: int, batches: Sequence[Any]) -> NDArray[np.float64]:
        with seeded(derive_seed(self.rounds.seed, number, "criterion")):
            statistics = collect_statistics(
                self.rounds.criterion, self.model, graph, batches, self.training
            )
        return importance_of(self.rounds.criterion, graph, self.model, statistics)

    def _align_(self, progress: SearchState) -> bool:
        """Round widths down, one group of coupled layers after the other; False if all are multiples."""
        start, number = time.perf_counter(), len(progress.rounds) + 1
        before = now = self._metric(progress)
        batches, metrics, removed = self.contest.batches(number), dict[str, float](), 0
        graph, own = self._traced(), {layer for block in self.blocks for layer in block.layers}
        for block in find_blocks(graph, None, self.rules.exclude):
            if own.isdisjoint(block.layers):
                continue
            remove = self._surplus(graph, block, number, batches)
            if not remove:
                continue
            tried = self._candidate(0, block.name, remove, number)
            outcome = self.contest.outcome(tried, batches, progress.optimizer)
            metrics[block.name] = outcome.metric
            if self.contest.bears(before, outcome):
                self._cut_(graph, remove, outcome, progress)
                graph, now, removed = self._traced(), outcome.metric, removed + len(remove)
        if metrics:
            cost = {resource: graph.cost(resource) for resource in graph.cost_models}
            steps, seconds = self.rounds.steps * len(metrics), time.perf_counter() - start
            facts = cost, self.dense.shares(graph), removed, steps, seconds
            progress.add(Round(number, ALIGNED, before, now, metrics, *facts))
        return bool(metrics)

    def _surplus(
        self, graph: ChannelGraph, block: CoupledBlock, number: int, batches: Sequence[Any]
    ) -> list[int]:
        """What ``block`` loses so that the widths of its layers are multiples."""
        free = within(self._importance(graph, number, batches), removable_units(graph, self.rules.exclude))
        return surplus(graph, free, block.layers, self.rounds.align, self.rules.limits, self.dense)

    def _cut_(
        self, graph: ChannelGraph, remove: Iterable[int], best: CandidateResult, progress: SearchState
    ) -> None:
        """The network becomes that of a candidate."""
        progress.take(prune_(self.model, graph, remove), best.optimizer)
        self.model.load_state_dict(best.weights)

    def _each(
        self, graph: ChannelGraph, importance: NDArray[np.float64], number: int
    ) -> Iterator[tuple[str, Plan]]:
        share = self.reductions[min(number, len(self.reductions)) - 1]
        rules = replace(self.rules, amount={self.resource: share})
        for block in self.blocks:
            units = block.units(graph)
            if len(units):
                yield block.name, rules.plan(graph, within(importance, units), self.dense)

    def _check_first(self, graph: ChannelGraph) -> None:
        """Raise ValueError if no block can give what the first round asks for."""
        if self.rules.met(graph, self.dense):
            raise ValueError(
                f"the network is within the budget as it is: {dict(self.rules.budget)}; lower it"
            )
        by_size = np.asarray(L2()(graph, self.model, {}), dtype=np.float64)
        plans = dict(self._each(graph, by_size, 1))
        if any(plan.stopped != "limits" for plan in plans.values()):
            return
        most = {name: 1 - plan.costs[self.resource].share for name, plan in plans.items()}
        best = sorted(most, key=lambda name: -most[name])[:3]
        raise ValueError(
            f"no block can give {self.reductions[0]:.1%} of the {self.resource} alone; the most are "
            f"{', '.join(f'{name} {most[name]:.1%}' for name in best) or 'none'}: lower the reduction, take more "
            "rounds or larger blocks, or loosen the limits"
        )

    def _stuck(self, graph: ChannelGraph) -> str:
        share = self.dense.shares(graph)[self.resource]
        return (
            f"the search ends above the budget, at {share:.1%} of the {self.resource}: limits and exclusions leave "
            "no block anything to lose; loosen those"
        )

    def key(self, *more: str) -> str:
        """A name for this search, of this network; ``more``: of what settings do not tell."""
        return json_digest([network_digest(self.model), self._settings(), more])[:12]

    def _settings(self) -> dict[str, Any]:
        """What makes this search another one, as plain values."""
        rounds = {k: v for k, v in vars(self.rounds).items() if k not in ("criterion", "blocks")}
        training = self.training
        return {
            "budget": dict(self.rules.budget),
            "limits": plainly(self.rules.limits),
            "exclude": list(self.rules.exclude),
            "costs": dict(self.dense.costs),
            "channel_multiple": self.rules.channel_multiple,
            "rounds": rounds,
            "criterion": plainly(self.rounds.criterion),
            "blocks": {block.name: list(block.layers) for block in self.blocks},
            "training": [training.higher_is_better, training.accumulate, batch_digest(training.batches)],
        }


def only(budget: Mapping[str, float]) -> str:
    """The resource of a budget in one resource."""
    if len(budget) != 1:
        raise ValueError(
            f"a search reduces one resource, step by step; the budget names {sorted(budget) or 'none'}"
        )
    return next(iter(budget))


def to_go(seconds: float) -> str:
    """How long it will take, for the end of a line.

    Example:
        >>> to_go(0), to_go(42.3), to_go(1500)
        ('', ' · about 42 s to go', ' · about 25 min to go')
    """
    if not seconds:
        return ""
    return f" · about {seconds:.0f} s to go" if seconds < 100 else f" · about {seconds / 60:.0f} min to go"


def target_share(budget: Mapping[str, float], dense: DenseSizes) -> float:
    """The share of the dense network that a budget in one resource leaves."""
    target = budget[only(budget)]
    return target if target <= 1 else target / max(dense.costs[only(budget)], 1)


def within(importance: NDArray[np.float64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same for ``units``, infinite for all others, so that these stay.

    Example:
        >>> within(np.array([1.0, 2.0, 3.0]), np.array([1]))
        array([inf,  2., inf])
    """
    found = np.full_like(importance, np.inf)
    found[units] = importance[units]
    return found
