"""One step of pruning: score, select, cut, and try again without what surgery refuses (level 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from lightning_prune.batches import Example, shapes_of
from lightning_prune.criteria import L2, Criterion, Gatherer, Gradients, Importance, blind_to
from lightning_prune.graph import ChannelGraph, Resource
from lightning_prune.limits import DenseSizes, Limits
from lightning_prune.memory import activations
from lightning_prune.processes import agreed, shared
from lightning_prune.record import PruningRecord
from lightning_prune.selection import Plan, check_budget, check_importance, resolve, select, si
from lightning_prune.statistics import ActivationDeviation, Collector, Statistics
from lightning_prune.surgery import SurgeryError, prune_
from lightning_prune.tracing import trace

__all__ = ["Cut", "Rules", "Run", "cut_", "facts", "unmet"]

ATTEMPTS = 5
#: counted where a budget names them, without being given
BUILT_IN: Mapping[str, Resource] = {"activations": activations}


@dataclass(frozen=True)
class Rules:
    """What is to remain and what may go; the arguments of :func:`~lightning_prune.selection.select`.

    And the ``resources`` that are counted beside MACs and parameters, and beside ``BUILT_IN`` ones.
    ``gone``, if given, is the share of what has to go that is gone after the next step: instead of an ``amount``.
    """

    budget: Mapping[str, float]
    amount: Mapping[str, float] | None = None
    limits: Limits = field(default_factory=Limits)
    exclude: Sequence[str] = ()
    channel_multiple: int = 1
    resources: Mapping[str, Resource] = field(default_factory=dict)
    gone: float | None = None

    def traced(self, model: nn.Module, example: Example) -> ChannelGraph:
        """The graph of ``model`` as it is now, with all the resources."""
        named = {*self.budget, *(self.amount or ())} & BUILT_IN.keys()
        resources = {**{name: BUILT_IN[name] for name in sorted(named)}, **self.resources}
        return trace(model, *example[0], **example[1]).with_resources(resources)

    def plan(self, graph: ChannelGraph, importance: Any, dense: DenseSizes) -> Plan:
        """The units of the next step."""
        found = select(
            graph,
            importance,
            self._goal(dense),
            amount=self.amount if self.gone is None else None,
            limits=self.limits,
            exclude=self.exclude,
            channel_multiple=self.channel_multiple,
            dense=dense,
        )
        return found if self.gone is None else self._on_the_way(found, dense)

    def _goal(self, dense: DenseSizes) -> Mapping[str, float]:
        """What may remain after the next step."""
        if self.gone is None or self.gone == 1:
            return self.budget
        targets = resolve(self.budget, dense.costs, "budget")
        return {
            r: 1 - self.gone * max(0, 1 - target / (dense.costs[r] or 1)) for r, target in targets.items()
        }

    def _on_the_way(self, plan: Plan, dense: DenseSizes) -> Plan:
        """A plan that met the goal of its step, as one that may have met the budget."""
        targets = resolve(self.budget, dense.costs, "budget")
        costs = {r: replace(spent, target=targets.get(r)) for r, spent in plan.costs.items()}
        plan = replace(plan, costs=costs)
        short = plan.stopped == "budget" and not plan.reached
        return replace(plan, stopped="amount") if short else plan

    def check(self, graph: ChannelGraph) -> None:
        """Raise ValueError if these rules make no sense for the dense network of ``graph``."""
        resolve(self.amount or {}, DenseSizes.of(graph).costs, "amount")
        check_budget(
            graph,
            self.budget,
            limits=self.limits,
            exclude=self.exclude,
            channel_multiple=self.channel_multiple,
        )

    def within(self, graph: ChannelGraph, dense: DenseSizes) -> set[str]:
        """The resources whose budget the network of ``graph`` meets."""
        targets = resolve(self.budget, dense.costs, "budget")
        return {resource for resource, target in targets.items() if graph.cost(resource) <= target}

    def met(self, graph: ChannelGraph, dense: DenseSizes) -> bool:
        """Whether the network of ``graph`` is within the budget."""
        return self.within(graph, dense) == self.budget.keys()

    def foreseen(self, graph: ChannelGraph, model: nn.Module) -> Plan:
        """How far these rules lead if the size of the filters decides: an honest guess before training."""
        return replace(self, amount=None).plan(graph, L2()(graph, model, {}), DenseSizes.of(graph))


@dataclass(frozen=True)
class Cut:
    """The facts of one cut, as plain numbers.

    Attributes:
        epoch: at whose end, or within which, it was made.
        filters: how many went, over all layers.
        layers: how many layers lost some.
        before: resource -> cost before it.
        after: resource -> exact cost after it.
        share: resource -> what remains of the dense network's.
        stopped: what ended the selection: ``"budget"``, ``"amount"`` or ``"limits"``.
        seconds: how long it took, proof included.
        step: the number of optimizer steps before it, if it was made within the epoch.
    """

    epoch: int
    filters: int
    layers: int
    before: dict[str, int]
    after: dict[str, int]
    share: dict[str, float]
    stopped: str
    seconds: float
    step: int | None = None

    @classmethod
    def of(cls, graph: ChannelGraph, plan: Plan, epoch: int, seconds: float, step: int | None = None) -> Cut:
        """The facts of carrying out ``plan`` on the network of ``graph``."""
        gone = [int(np.isin(units, plan.remove).sum()) for units in graph.layers.values()]
        before = {resource: spent.before for resource, spent in plan.costs.items()}
        after = {resource: spent.after for resource, spent in plan.costs.items()}
        share = {resource: spent.after / max(spent.dense, 1) for resource, spent in plan.costs.items()}
        facts = before, after, share, plan.stopped, seconds, step
        return cls(epoch, sum(gone), sum(n > 0 for n in gone), *facts)

    def __str__(self) -> str:
        costs = "".join(
            f" · {resource} {si(self.before[resource])} → {si(self.after[resource])} ({share:.1%} of dense)"
            for resource, share in self.share.items()
        )
        gone = f"cut {self.filters} filters in {self.layers} layers"
        when = f"epoch {self.epoch}" + ("" if self.step is None else f", step {self.step}")
        return f"{when}: {gone}{costs} · {self.seconds:.1f} s"


def gathers(criterion: Criterion) -> Callable[..., Gatherer] | None:
    """How the criterion gathers for itself, while training, what hooks on activations do not see."""
    return getattr(criterion, "gather", None)


def facts(graph: ChannelGraph, dense: DenseSizes) -> dict[str, float]:
    """What there is now, for a logger: costs, their share of the dense ones, units that could still go."""
    costs = {resource: graph.cost(resource) for resource in graph.cost_models}
    found = {f"prune/{resource}": float(cost) for resource, cost in costs.items()}
    found |= {
        f"prune/{resource}_share": cost / max(dense.costs[resource], 1) for resource, cost in costs.items()
    }
    return {**found, "prune/units": float(len(graph.prunable))}


def unmet(rules: Rules, graph: ChannelGraph, dense: DenseSizes, last: Plan | None) -> str:
    """Why pruning ended above the budget, and what can be done about it."""
    shares = {r: graph.cost(r) / max(dense.costs[r], 1) for r in rules.budget}
    reached = ", ".join(f"{resource} {share:.3f}" for resource, share in shares.items())
    limited = last is not None and last.stopped == "limits"
    way_out = "loosen limits or exclusions" if limited else "train for more epochs, or raise amount"
    ending = f" ({last.ending})" if last is not None and limited else ""
    return f"budget {dict(rules.budget)} not met: {reached} of the dense network remain; {way_out}{ending}"


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
