"""The rounds of a search: the class behind :func:`lightning_prune.netadapt.run.search`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from lightning_prune.criteria.weights import L2
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.netadapt.alignment import least_surplus_units, surplus_units
from lightning_prune.netadapt.candidate import Candidate, CandidateResult
from lightning_prune.netadapt.ranking import CandidateRanking
from lightning_prune.netadapt.repair import SearchRepair
from lightning_prune.netadapt.rounds import (
    ALIGNED,
    Round,
    Rounds,
    SearchResult,
    remaining_time,
    single_resource,
    target_share,
)
from lightning_prune.netadapt.state import SearchState, stable_repr
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.step import importance_of
from lightning_prune.pruning.training import Training
from lightning_prune.selection.coupled_blocks import CoupledBlock, find_blocks
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.optimal import OptimalSelection
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.selection.prunable import removable_units, restrict_to
from lightning_prune.surgery.prune import prune_
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.formatting import amounts
from lightning_prune.utils.hashing import batch_digest, json_digest, network_digest
from lightning_prune.utils.passing import on_all
from lightning_prune.utils.seeding import derive_seed, seeded

__all__ = ["ONE_WORKER", "Searcher"]

ONE_WORKER = Workers()


class Searcher:
    """Runs the rounds of a search; see :func:`~lightning_prune.netadapt.run.search` for arguments and errors."""

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        policy: PruningPolicy,
        training: Training,
        rounds: Rounds,
        workers: Workers,
        repair: SearchRepair | None = None,
        dense: DenseSizes | None = None,
    ) -> None:
        self.model, self.example, self.training = model, example, training
        self.rounds, self.resource = rounds, single_resource(policy.budget)
        self.selection = OptimalSelection.of(policy.selection)  # of the alignment; rounds cut one block each
        self.policy = replace(policy, amount=None, selection="greedy")
        self.ranking = CandidateRanking(model, example, training, rounds, workers, self.resource, repair)
        graph = self._trace()
        self.dense = DenseSizes.of(graph) if dense is None else dense  # of a network that was pruned before
        self.blocks = find_blocks(graph, rounds.blocks, policy.exclude)
        self.reductions = rounds.reductions(target_share(policy.budget, self.dense))
        if not len(training.batches):
            raise ValueError("there are no training batches for the candidates")
        self.policy.check(graph)
        self._check_first_round(graph)

    def run(
        self,
        optimizer: dict[str, Any] | None,
        folder: Path | None,
        report: Callable[[str], None],
        bar: bool = False,
        verify: bool = True,
    ) -> SearchResult:
        """Run all rounds, and the alignment; continue from the state in ``folder`` if there is one.

        Args:
            optimizer: state of the optimizer that the model was trained with.
            folder: where the state is saved.
            report: is called with one line per round.
            bar: show the progress of each round on a terminal.
            verify: whether the checksums of the state must be right.
        """
        state = SearchState.begin(folder, self.model, self._settings(), optimizer)
        if state.restore_(self.model, lambda: self.ranking.current_metric(state.optimizer), verify):
            report(f"continuing after round {len(state.rounds)}, from {folder}")
        while not self.policy.is_met(graph := self._trace(), self.dense):
            if not self._run_round_(graph, state, bar):
                warnings.warn(self._stopped_early(graph), stacklevel=3)
                break
            self._save_and_report(state, report)
        if self.rounds.align > 1 and not state.is_aligned and self._align_(state):
            self._save_and_report(state, report)
        reached = self.policy.is_met(self._trace(), self.dense)
        return SearchResult(state.record, state.rounds, reached, state.optimizer)

    def key(self, *more: str) -> str:
        """Return a name for this search of this network; ``more`` describes what the settings do not contain."""
        settings = {
            k: v for k, v in self._settings().items() if v is not None
        }  # as before there were repairs
        return json_digest([network_digest(self.model), settings, more])[:12]

    def _trace(self) -> ChannelGraph:
        return self.policy.trace(self.model, self.example)

    def _save_and_report(self, state: SearchState, report: Callable[[str], None]) -> None:
        state.save(self.model)
        rounds_left = max(len(self.reductions) - len(state.rounds), 0)
        mean_seconds = sum(item.seconds for item in state.rounds) / len(state.rounds)
        line = state.rounds[-1].line(self.resource, len(self.reductions))
        report(line + remaining_time(rounds_left * mean_seconds))

    def _run_round_(self, graph: ChannelGraph, state: SearchState, bar: bool) -> bool:
        """Run one round; return False if there is nothing left to remove."""
        start, number = time.perf_counter(), len(state.rounds) + 1
        batches = self.ranking.batches(number)
        plans = self._plans(graph, number, batches)
        if not plans:
            return False
        before = self._metric(state)
        candidates = [self._candidate(i, name, plan, number) for i, (name, plan) in enumerate(plans.items())]
        results = self.ranking.results(candidates, batches, state.optimizer)
        best, metrics = self.ranking.best(plans, before, _with_bar(results, number, len(plans), bar))
        block = list(plans)[best.index]
        plan = plans[block]
        self._cut_(graph, plan.remove, best, state)
        state.rounds.append(
            Round(
                number=number,
                block=block,
                before=before,
                after=best.metric,
                metrics=metrics,
                cost={resource: change.after for resource, change in plan.costs.items()},
                share={resource: change.share for resource, change in plan.costs.items()},
                removed=len(plan),
                steps=self.rounds.steps * len(plans),
                seconds=time.perf_counter() - start,
                change=best.change,
            )
        )
        return True

    def _metric(self, state: SearchState) -> float:
        """Return the metric of the current network."""
        return state.rounds[-1].after if state.rounds else self.ranking.current_metric(state.optimizer)

    def _candidate(self, index: int, name: str, remove: Iterable[int], number: int) -> Candidate:
        # The seed depends on round and block, so that it is the same on every worker and in a continued search.
        return Candidate(index, name, tuple(remove), derive_seed(self.rounds.seed, number, name))

    def _plans(self, graph: ChannelGraph, number: int, batches: Sequence[Any]) -> dict[str, Plan]:
        """Return the plan of each block that gives the whole reduction; if none does, of each that gives any."""
        importance = self._importance(graph, number, batches)
        plans = self._block_plans(graph, importance, number)
        complete = {name: plan for name, plan in plans.items() if plan.stopped != "limits"}
        return complete or {name: plan for name, plan in plans.items() if len(plan)}

    def _block_plans(
        self, graph: ChannelGraph, importance: NDArray[np.float64], number: int
    ) -> dict[str, Plan]:
        """Return, for each block with units left, the plan that removes the reduction of a round from it alone."""
        share = self.reductions[min(number, len(self.reductions)) - 1]
        policy = replace(self.policy, amount={self.resource: share})
        block_units = {block.name: block.units(graph) for block in self.blocks}
        return {
            name: policy.plan(graph, restrict_to(importance, units), self.dense)
            for name, units in block_units.items()
            if len(units)
        }

    def _importance(self, graph: ChannelGraph, number: int, batches: Sequence[Any]) -> NDArray[np.float64]:
        criterion = self.rounds.criterion
        with seeded(derive_seed(self.rounds.seed, number, "criterion")):
            statistics = collect_statistics(criterion, self.model, graph, batches, self.training)
        return importance_of(criterion, graph, self.model, statistics)

    def _align_(self, state: SearchState) -> bool:
        """Round widths down, one group of coupled layers after the other; return False if all are multiples."""
        start, number = time.perf_counter(), len(state.rounds) + 1
        before = after = self._metric(state)
        batches, metrics, removed = self.ranking.batches(number), dict[str, float](), 0
        graph = self._trace()
        for group in self._coupled_groups(graph):
            remove = self._surplus(graph, group, number, batches)
            if not remove:
                continue
            result = self.ranking.result(
                self._candidate(0, group.name, remove, number), batches, state.optimizer
            )
            metrics[group.name] = result.metric
            if self.ranking.is_tolerable(before, result):
                self._cut_(graph, remove, result, state)
                graph, after, removed = self._trace(), result.metric, removed + len(remove)
        if metrics:
            state.rounds.append(
                Round(
                    number=number,
                    block=ALIGNED,
                    before=before,
                    after=after,
                    metrics=metrics,
                    cost={resource: graph.cost(resource) for resource in graph.cost_models},
                    share=self.dense.shares(graph),
                    removed=removed,
                    steps=self.rounds.steps * len(metrics),
                    seconds=time.perf_counter() - start,
                )
            )
        return bool(metrics)

    def _coupled_groups(self, graph: ChannelGraph) -> list[CoupledBlock]:
        """Return the groups of coupled layers in the blocks of the search."""
        layers = {layer for block in self.blocks for layer in block.layers}
        groups = find_blocks(graph, None, self.policy.exclude)
        return [group for group in groups if not layers.isdisjoint(group.layers)]

    def _surplus(
        self, graph: ChannelGraph, group: CoupledBlock, number: int, batches: Sequence[Any]
    ) -> list[int]:
        """Return the units to remove so that the widths of a group of coupled layers are multiples."""
        importance = self._importance(graph, number, batches)
        importance = restrict_to(importance, removable_units(graph, self.policy.exclude))
        surplus = surplus_units if self.selection is None else partial(least_surplus_units, self.selection)
        return surplus(graph, importance, group.layers, self.rounds.align, self.policy.limits, self.dense)

    def _cut_(
        self, graph: ChannelGraph, remove: Iterable[int], result: CandidateResult, state: SearchState
    ) -> None:
        """Turn the model into the network of a candidate."""
        state.take(on_all(lambda: prune_(self.model, graph, remove)), result.optimizer)
        self.model.load_state_dict(result.weights)

    def _check_first_round(self, graph: ChannelGraph) -> None:
        """Raise ValueError if no block can give the reduction of the first round."""
        if self.policy.is_met(graph, self.dense):
            raise ValueError(
                f"the network already meets the budget of {amounts(self.policy.budget)}; lower it"
            )
        norms = np.asarray(L2()(graph, self.model, {}), dtype=np.float64)
        plans = self._block_plans(graph, norms, 1)
        if any(plan.stopped != "limits" for plan in plans.values()):
            return
        largest = {name: 1 - plan.costs[self.resource].share for name, plan in plans.items()}
        best = sorted(largest, key=lambda name: -largest[name])[:3]
        raise ValueError(
            f"no block can give {self.reductions[0]:.1%} of the {self.resource} alone; the most are "
            f"{', '.join(f'{name} {largest[name]:.1%}' for name in best) or 'none'}: lower the reduction, use more "
            "rounds or larger blocks, or loosen the limits"
        )

    def _stopped_early(self, graph: ChannelGraph) -> str:
        share = self.dense.shares(graph)[self.resource]
        return (
            f"the search ends above the budget, at {share:.1%} of the {self.resource}: limits and exclusions leave "
            "nothing to remove in any block; loosen them"
        )

    def _settings(self) -> dict[str, Any]:
        """Return all settings that the result depends on, as plain values."""
        rounds = {k: v for k, v in vars(self.rounds).items() if k not in ("criterion", "blocks")}
        training, repair = self.training, self.ranking.repair
        return {
            "budget": dict(self.policy.budget),
            "limits": stable_repr(self.policy.limits),
            "exclude": list(self.policy.exclude),
            "costs": dict(self.dense.costs),
            "channel_multiple": self.policy.channel_multiple,
            "rounds": rounds,
            "criterion": stable_repr(self.rounds.criterion),
            "blocks": {block.name: list(block.layers) for block in self.blocks},
            "training": [training.higher_is_better, training.accumulate, batch_digest(training.batches)],
            "compensation": None if repair is None else repair.description(),
            "selection": None if self.selection is None else stable_repr(self.selection),
        }


class _Bar(tqdm):
    """Progress bar without tqdm's thread: a process that is forked while another thread is there cannot train."""

    monitor_interval = 0


def _with_bar(
    results: Iterator[CandidateResult], number: int, candidates: int, bar: bool
) -> Iterator[CandidateResult]:
    """Yield the results; with ``bar``, show a progress bar on a terminal, which disappears after the round."""
    disable = None if bar else True  # None: tqdm shows it on a terminal only
    yield from _Bar(results, f"round {number}", candidates, leave=False, disable=disable, unit="candidate")
