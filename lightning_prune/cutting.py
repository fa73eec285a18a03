"""One step of pruning: score, select, cut, and try again without what surgery refuses (level 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.batches import Example, shapes_of
from lightning_prune.criteria import Criterion, Gatherer, Gradients, Importance, blind_to
from lightning_prune.deviation import ActivationDeviation
from lightning_prune.graph import ChannelGraph
from lightning_prune.limits import DenseSizes
from lightning_prune.policy import Rules
from lightning_prune.processes import agreed, shared
from lightning_prune.record import PruningRecord
from lightning_prune.selection import Plan, check_importance
from lightning_prune.statistics import Collector, Statistics
from lightning_prune.surgery import SurgeryError, prune_

__all__ = ["Rules", "Run", "cut_", "gathers"]

ATTEMPTS = 5


def gathers(criterion: Criterion) -> Callable[..., Gatherer] | None:
    """How the criterion gathers for itself, while training, what hooks on activations do not see."""
    return getattr(criterion, "gather", None)


def scored(
    criterion: Criterion,
    graph: ChannelGraph,
    model: nn.Module,
    statistics: Statistics,
    met: Collection[str] = (),
) -> Importance:
    """Importance by a criterion that need no longer look at what ``met`` costs.

    Raises:
        ValueError: it does not fit the graph; the message names the criterion.
    """
    try:
        return check_importance(graph, blind_to(criterion, met)(graph, model, statistics))
    except ValueError as error:
        error.add_note(f"criterion: {getattr(criterion, '__qualname__', criterion)}; nothing was cut")
        raise


def cut_(
    model: nn.Module,
    graph: ChannelGraph,
    rules: Rules,
    criterion: Criterion,
    statistics: Statistics,
    dense: DenseSizes,
    optimizers: Sequence[Optimizer] = (),
) -> tuple[Plan, PruningRecord]:
    """Score, select and prune once. What surgery refuses is pinned, with a warning, and selected around.

    In a distributed run every process calls this; all carry out the plan of the first one, and whether they all
    did the same is checked.

    Args:
        model: the network, changed in place.
        graph: its graph.
        rules: what is to remain and what may go.
        criterion: scores the units.
        statistics: what it may want to know of the activations.
        dense: what shares refer to.
        optimizers: whose state is cut along.

    Returns:
        What was done, and its record (empty if there was nothing to remove).

    Raises:
        SurgeryError: surgery refuses again and again; the model is as it was.
        RuntimeError: the processes of a distributed run did not do the same.
    """
    importance = scored(criterion, graph, model, statistics, rules.within(graph, dense))
    for attempt in range(1, ATTEMPTS + 1):
        plan = shared(rules.plan(graph, importance, dense))
        if not len(plan):
            return plan, PruningRecord()
        record, error = _attempt(model, graph, plan, optimizers)
        agreed("the cut", record.kept if error is None else str(error))
        if error is None:
            return plan, record
        if not len(error.units) or attempt == ATTEMPTS:
            raise error
        warnings.warn(f"{error}; {len(error.units)} units stay, selecting again", stacklevel=2)
        refused = dict.fromkeys(error.units.tolist(), f"surgery refused: {error}")
        graph = replace(graph, pinned={**refused, **graph.pinned})
    raise AssertionError("unreachable")


def _attempt(
    model: nn.Module, graph: ChannelGraph, plan: Plan, optimizers: Sequence[Optimizer]
) -> tuple[PruningRecord, SurgeryError | None]:
    """The record of a cut, or what surgery says against it."""
    try:
        return prune_(model, graph, plan.remove, optimizers), None
    except SurgeryError as error:
        return PruningRecord(), error


@dataclass
class Run:
    """A network on its way from dense to small: what is known of it between two cuts.

    Attributes:
        target: the module that is pruned.
        example: what it is traced on.
        graph: its graph as it is now.
        dense: its sizes before the first cut.
        compiled: hooks see nothing of it while it trains.
        collector: what gathers statistics at the moment.
        last: the last plan.
        exhausted: there is nothing more to remove.
    """

    target: nn.Module
    example: Example
    graph: ChannelGraph
    dense: DenseSizes
    compiled: bool = False
    collector: Gatherer | None = None
    last: Plan | None = None
    exhausted: bool = False

    def collect(self, criterion: Criterion) -> bool:
        """Start to gather what the criterion wants to know; False if that is nothing."""
        statistic, gather = getattr(criterion, "statistic", ActivationDeviation), gathers(criterion)
        self.forget()
        if gather is not None:
            self.collector = gather(self.graph, self.target)
        elif statistic is not None:
            self.collector = Collector(self.graph, self.target, statistic).attach()
        return self.collector is not None

    def stepping(self, optimizer: Optimizer) -> None:
        """Look at the gradients with which ``optimizer`` is about to step, if the criterion wants to know them."""
        if isinstance(self.collector, Gradients):
            self.collector.update(p for group in optimizer.param_groups for p in group["params"])

    def watch(self, active: bool) -> None:
        """Let the forwards that follow count, or not."""
        if self.collector is not None:
            self.collector.active = active

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold so that :meth:`take_up` goes on from here: tensors, plain values."""
        statistics = None if self.collector is None else self.collector.state()
        return {
            "example": shapes_of(self.example),
            "exhausted": self.exhausted,
            "statistics": statistics,
        }

    def take_up(self, state: Mapping[str, Any], criterion: Criterion) -> None:
        """Go on from what :meth:`state` gave; forwards do not count until :meth:`watch` says so."""
        self.exhausted = state["exhausted"]
        if state["statistics"] is not None and self.collect(criterion) and self.collector is not None:
            self.collector.load(state["statistics"])
            self.watch(False)

    def forget(self) -> None:
        """Remove the hooks, and what they gathered."""
        if self.collector is not None:
            self.collector.detach()
        self.collector = None

    def cut_(
        self,
        rules: Rules,
        criterion: Criterion,
        optimizers: Sequence[Optimizer] = (),
    ) -> PruningRecord:
        """:func:`cut_` with what was gathered, and trace the smaller network. If surgery refuses: warn."""
        statistics = {} if self.collector is None else self.collector.compute()
        self.forget()
        try:
            self.last, record = cut_(
                self.target, self.graph, rules, criterion, statistics, self.dense, optimizers
            )
        except SurgeryError as error:
            self.exhausted = True
            warnings.warn(f"no more cuts, the network stays as it is: {error}", stacklevel=2)
            return PruningRecord()
        self.exhausted = self.last.stopped == "limits"
        if record:
            self.graph = rules.traced(self.target, self.example)
        return record
