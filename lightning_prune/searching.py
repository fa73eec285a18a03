"""The rounds of a search, one after the other: what :func:`lightning_prune.netadapt.search` runs (level 3)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.alignment import surplus
from lightning_prune.batches import Example
from lightning_prune.blocks import Block, find_blocks
from lightning_prune.candidates import Candidate, Outcome, Shared, Training, Workers, on_device, packed, run
from lightning_prune.criteria import L2
from lightning_prune.cutting import Rules, scored
from lightning_prune.graph import ChannelGraph
from lightning_prune.limits import DenseSizes
from lightning_prune.observing import observed
from lightning_prune.randomness import seed_of, seeded
from lightning_prune.record import PruningRecord
from lightning_prune.rounds import ALIGNED, Found, Round, Rounds
from lightning_prune.search_state import Progress, fingerprint, plainly
from lightning_prune.selection import Plan, candidates
from lightning_prune.surgery import prune_
from lightning_prune.teacher import checksum

__all__ = ["ALONE", "CALIBRATION", "Search"]

#: batches that batch norms are estimated on, at least
CALIBRATION = 4
ALONE = Workers()


class Search:
    """A search under way: what :func:`search` keeps between two rounds."""

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        rules: Rules,
        training: Training,
        rounds: Rounds,
        workers: Workers,
    ) -> None:
        self.model, self.example, self.training, self.workers = model, example, training, workers
        self.rounds, self.resource = rounds, only(rules.budget)
        self.rules = replace(rules, amount=None)
        graph = self.rules.traced(model, example)
        self.dense = DenseSizes.of(graph)
        self.blocks = find_blocks(graph, rounds.blocks, rules.exclude)
        self.reductions = rounds.reductions(self._share(graph))
        if not len(training.batches):
            raise ValueError("there are no training batches for the candidates")
        self.rules.check(graph)
        self._check_first(graph)

    def run(
        self, optimizer: dict[str, Any] | None, folder: Path | None, report: Callable[[str], None]
    ) -> Found:
        """All rounds, from the state in ``folder`` on if there is one."""
        progress = Progress.begin(folder, self.model, self._settings(), optimizer)
        if progress.restore_(self.model, lambda: self._judged(progress)):
            report(f"going on after round {len(progress.rounds)}, from {folder}")
        while not self.rules.met(graph := self.rules.traced(self.model, self.example), self.dense):
            if not self._round_(graph, progress):
                warnings.warn(self._stuck(graph), stacklevel=3)
                break
            progress.save(self.model)
            report(Round(**progress.rounds[-1]).line(self.resource, len(self.reductions)))
        if self.rounds.align > 1 and not progress.is_over and self._align_(progress):
            progress.save(self.model)
            report(Round(**progress.rounds[-1]).line(self.resource, len(self.reductions)))
        facts = [Round(**each) for each in progress.rounds]
        reached = self.rules.met(self.rules.traced(self.model, self.example), self.dense)
        return Found(progress.record, facts, reached, progress.optimizer)

    def _round_(self, graph: ChannelGraph, progress: Progress) -> bool:
        """One round; False if there is nothing left to remove."""
        start, number = time.perf_counter(), len(progress.rounds) + 1
        batches = self._batches(number)
        plans = self._plans(graph, number, batches)
        if not plans:
            return False
        before = progress.rounds[-1]["after"] if progress.rounds else self._judged(progress)
        names = list(plans)
        several = [
            Candidate(i, name, tuple(plans[name]), seed_of(self.rounds.seed, number, name))
            for i, name in enumerate(names)
        ]
        best, metrics = self._best(several, plans, before, self._shared(progress, batches))
        won = names[best.index]
        progress.take(self._cut_(graph, plans[won].remove, best), best.optimizer)
        seconds = time.perf_counter() - start
        steps = self.rounds.steps * len(plans)
        facts = self._facts(number, won, before, best.metric, metrics, plans[won], steps, seconds)
        progress.add(asdict(facts))
        return True

    def _facts(
        self,
        number: int,
        won: str,
        before: float,
        after: float,
        metrics: dict[str, float],
        plan: Plan,
        steps: int,
        seconds: float,
    ) -> Round:
        cost = {resource: spent.after for resource, spent in plan.costs.items()}
        share = {resource: spent.after / max(spent.dense, 1) for resource, spent in plan.costs.items()}
        return Round(number, won, before, after, metrics, cost, share, len(plan), steps, seconds)

    def _plans(self, graph: ChannelGraph, number: int, batches: Sequence[Any]) -> dict[str, Plan]:
        """What each block would lose: those that can give the whole reduction, or else those that can give any."""
        importance = self._importance(graph, number, batches)
        plans = dict(self._each(graph, importance, number))
        whole = {name: plan for name, plan in plans.items() if plan.stopped != "limits"}
        return whole or {name: plan for name, plan in plans.items() if len(plan)}

    def _importance(self, graph: ChannelGraph, number: int, batches: Sequence[Any]) -> NDArray[np.float64]:
        with seeded(seed_of(self.rounds.seed, number, "criterion")):
            statistics = observed(
                self.rounds.criterion, self.model, graph, self.example, batches, self.training
            )
        return scored(self.rounds.criterion, graph, self.model, statistics)

    def _align_(self, progress: Progress) -> bool:
        """Round widths down, one group of coupled layers after the other; False if all are multiples."""
        start, number = time.perf_counter(), len(progress.rounds) + 1
        before = now = progress.rounds[-1]["after"] if progress.rounds else self._judged(progress)
        batches, metrics, removed = self._batches(number), dict[str, float](), 0
        graph = self.rules.traced(self.model, self.example)
        own = {layer for block in self.blocks for layer in block.layers}
        for block in find_blocks(graph, None, self.rules.exclude):
            if own.isdisjoint(block.layers):
                continue
            remove = self._surplus(graph, block, number, batches)
            if not remove:
                continue
            tried = Candidate(0, block.name, tuple(remove), seed_of(self.rounds.seed, number, block.name))
            (outcome,) = run(
                packed(self._shared(progress, batches)), [tried], replace(self.workers, n_jobs=1)
            )
            metrics[block.name] = outcome.metric
            if self._bears(before, outcome):
                progress.take(self._cut_(graph, remove, outcome), outcome.optimizer)
                graph = self.rules.traced(self.model, self.example)
                now, removed = outcome.metric, removed + len(remove)
        if metrics:
            cost = {resource: graph.cost(resource) for resource in graph.cost_models}
            share = {resource: each / max(self.dense.costs[resource], 1) for resource, each in cost.items()}
            steps, seconds = self.rounds.steps * len(metrics), time.perf_counter() - start
            progress.add(
                asdict(Round(number, ALIGNED, before, now, metrics, cost, share, removed, steps, seconds))
            )
        return bool(metrics)

    def _surplus(self, graph: ChannelGraph, block: Block, number: int, batches: Sequence[Any]) -> list[int]:
        """What ``block`` loses so that the widths of its layers are multiples."""
        free = within(self._importance(graph, number, batches), candidates(graph, self.rules.exclude))
        return surplus(graph, free, block.layers, self.rounds.align, self.rules.limits, self.dense)

    def _bears(self, before: float, outcome: Outcome) -> bool:
        """Whether a network is still as good as ``before``, but for what is tolerated."""
        if not math.isfinite(outcome.metric):
            warnings.warn(f"an alignment is dropped: {outcome.error or outcome.metric}", stacklevel=4)
            return False
        lost = (before - outcome.metric) if self.training.higher_is_better else (outcome.metric - before)
        return self.rounds.tolerance is None or lost <= self.rounds.tolerance

    def _cut_(self, graph: ChannelGraph, remove: Any, best: Outcome) -> PruningRecord:
        """The network becomes that of a candidate."""
        record = prune_(self.model, graph, remove)
        self.model.load_state_dict(best.weights)
        return record

    def _each(
        self, graph: ChannelGraph, importance: NDArray[np.float64], number: int
    ) -> Iterator[tuple[str, Plan]]:
        share = self.reductions[min(number, len(self.reductions)) - 1]
        rules = replace(self.rules, amount={self.resource: share})
        for block in self.blocks:
            units = block.units(graph)
            if len(units):
                yield block.name, rules.plan(graph, within(importance, units), self.dense)

    def _best(
        self, several: Sequence[Candidate], plans: Mapping[str, Plan], before: float, shared: Shared
    ) -> tuple[Outcome, dict[str, float]]:
        """The outcome that stays, and the metric of each; only the best one's weights are kept meanwhile."""
        best, best_key, metrics = None, (math.inf, 0), {}
        names = {candidate.index: candidate.name for candidate in several}
        for outcome in run(packed(shared), several, self.workers):
            name = names[outcome.index]
            metrics[name] = outcome.metric
            if not math.isfinite(outcome.metric):
                reason = outcome.error or f"its metric is {outcome.metric}"
                warnings.warn(f"the candidate of block {name!r} is dropped: {reason}", stacklevel=4)
                continue
            key = self._loss(outcome.metric, before, plans[name]), outcome.index
            if best is None or key < best_key:
                best, best_key = outcome, key
        if best is None:
            raise RuntimeError(
                "all candidates of the round failed; the network is as after the round before. See the warnings"
            )
        return best, {name: metrics[name] for name in names.values()}

    def _loss(self, metric: float, before: float, plan: Plan) -> float:
        """What is to be as low as possible."""
        lost = (before - metric) if self.training.higher_is_better else (metric - before)
        if self.rounds.by == "metric" or lost <= 0:
            return lost
        spent = plan.costs[self.resource]
        return lost * spent.dense / max(spent.before - spent.after, 1)

    def _judged(self, progress: Progress) -> float:
        """The metric of the network before the first round."""
        pack = packed(self._shared(progress, []))
        as_it_is = Candidate(0, "the network", (), self.rounds.seed)
        (outcome,) = run(pack, [as_it_is], replace(self.workers, n_jobs=1))
        if not math.isfinite(outcome.metric):
            raise ValueError(f"the metric of the network is {outcome.metric} before anything was pruned")
        return outcome.metric

    def _shared(self, progress: Progress, batches: Sequence[Any]) -> Shared:
        model = copy.deepcopy(self.model).cpu()
        example = on_device(self.example, torch.device("cpu"))
        return Shared(
            model, example, replace(self.training, batches=batches), progress.optimizer, self.rounds.steps
        )

    def _batches(self, number: int) -> list[Any]:
        """Those of a round: the next ones, from the beginning again when they are through."""
        held, each = self.training.batches, max(self.rounds.steps * self.training.accumulate, 1)
        return [held[((number - 1) * each + i) % len(held)] for i in range(max(each, CALIBRATION))]

    def _share(self, graph: ChannelGraph) -> float:
        target = self.rules.budget[self.resource]
        return target if target <= 1 else target / max(graph.cost(self.resource), 1)

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
        spent = {name: plan.costs[self.resource] for name, plan in plans.items()}
        most = {name: (s.before - s.after) / max(s.dense, 1) for name, s in spent.items()}
        best = sorted(most, key=lambda name: -most[name])[:3]
        raise ValueError(
            f"no block can give {self.reductions[0]:.1%} of the {self.resource} alone; the most are "
            f"{', '.join(f'{name} {most[name]:.1%}' for name in best) or 'none'}: lower the reduction, take more "
            "rounds or larger blocks, or loosen the limits"
        )

    def _stuck(self, graph: ChannelGraph) -> str:
        share = graph.cost(self.resource) / max(self.dense.costs[self.resource], 1)
        return (
            f"the search ends above the budget, at {share:.1%} of the {self.resource}: limits and exclusions leave "
            "no block anything to lose; loosen those"
        )

    def key(self, *more: str) -> str:
        """A name for this search, of this network; ``more``: of what settings do not tell."""
        told = json.dumps([checksum(self.model), self._settings(), more], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

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
            "training": [training.higher_is_better, training.accumulate, fingerprint(training.batches)],
        }


def only(budget: Mapping[str, float]) -> str:
    """The resource of a budget in one resource."""
    if len(budget) != 1:
        raise ValueError(
            f"a search reduces one resource, step by step; the budget names {sorted(budget) or 'none'}"
        )
    return next(iter(budget))


def within(importance: NDArray[np.float64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same for ``units``, infinite for all others, so that these stay.

    Example:
        >>> within(np.array([1.0, 2.0, 3.0]), np.array([1]))
        array([inf,  2., inf])
    """
    found = np.full_like(importance, np.inf)
    found[units] = importance[units]
    return found
