"""What is to remain of a network and what may go (level 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_prune.criteria.weights import L2
from lightning_prune.graph.activation_costs import activations
from lightning_prune.graph.channel_graph import ChannelGraph, Resource
from lightning_prune.graph.trace import trace
from lightning_prune.selection.budget import check_budget, resolve
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.select import select
from lightning_prune.utils.example_inputs import Example

__all__ = ["PruningPolicy"]

#: counted where a budget names them, without being given
BUILT_IN: Mapping[str, Resource] = {"activations": activations}


@dataclass(frozen=True)
class PruningPolicy:
    """What is to remain and what may go; the arguments of :func:`~lightning_prune.selection.select.select`.

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
