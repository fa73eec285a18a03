"""The pruning policy: the budget, and what may be removed to meet it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypedDict, Unpack, runtime_checkable

import numpy as np
from torch import nn

from lightning_prune.criteria.weights import L2
from lightning_prune.graph.activation_costs import activations
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.graph.channel_graph import ChannelGraph, Resource
from lightning_prune.graph.costs import Term
from lightning_prune.graph.trace import trace
from lightning_prune.selection.budget import check_amounts, check_budget, check_names, resolve
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.depth import PlanLoss, select_with_depth, smallest_network
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.optimal import OptimalSelection, Selection
from lightning_prune.selection.optimal_plan import unreachable
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.select import select
from lightning_prune.utils.distributed import from_first
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.vanished import vanished_blocks

__all__ = ["PolicyArguments", "PruningPolicy", "with_depth"]

ALWAYS = ("macs", "params")  # resources that every graph counts
#: resources that are counted if a budget or amount names them, without an entry in ``resources``
BUILT_IN: Mapping[str, Resource] = {"activations": activations}


class PolicyArguments(TypedDict, total=False):
    """Keyword arguments by which a pruning callback builds its :class:`PruningPolicy`; see there."""

    limits: Limits | None
    exclude: Sequence[str]
    channel_multiple: int
    resources: Mapping[str, Resource] | None
    selection: Selection


@runtime_checkable
class MeasuredResource(Protocol):
    """A resource that can measure the network of a plan, so that its budget is met by measurement."""

    def __call__(self, graph: ChannelGraph) -> Sequence[Term]:
        """Return the terms whose sum is the predicted cost, see :class:`~lightning_prune.graph.Resource`."""

    def settle(self, graph: ChannelGraph, plan_of: Callable[[ChannelGraph], Plan], resource: str) -> Plan:
        """Return the plan of ``plan_of``, or of a graph with corrected predictions, in which it is ``resource``."""


@dataclass(frozen=True)
class PruningPolicy:
    """Budget of a network, and the rules by which units may be removed.

    Args:
        budget: what must remain of one or several resources, all of which have to be met: ``"macs"``, ``"params"``,
            ``"activations"``, or one of ``resources`` -> a share of the dense network in (0, 1], or an absolute
            amount above 1. MACs are those of one forward on the example input, activations the number of elements
            that it writes.
        amount: what is removed in one cut, in the same way; None: everything down to the budget.
        limits: how much of a layer or block may be removed; by default three quarters of every layer's parameters.
        exclude: names or globs of layers, or of their containers, whose filters stay.
        channel_multiple: layers that are cut keep a multiple of this many channels.
        resources: further resources by name, so that the budget can name them.
        removed_share: of what has to be removed in all, the share that is removed after the next cut; replaces
            ``amount`` where a schedule is used.
        selection: ``"greedy"`` takes the least important units one by one; ``"optimal"``, or
            :class:`~lightning_prune.OptimalSelection`, chooses the widths of all layers at once, so that the plan of
            each cut removes the least importance in all.
        depth: which residual blocks may vanish as a whole; None: none. Callbacks other than
            :class:`~lightning_prune.FilterPruningCallback` remove channels only.

    Raises:
        ValueError: budget or amount is no mapping from names of resources to numbers, a name or the selection is
            unknown.

    Example:
        >>> policy = PruningPolicy({"macs": 0.5}, limits=Limits(0.9), exclude=["head"])
        >>> policy.channel_multiple
        1
    """

    budget: Mapping[str, float]
    amount: Mapping[str, float] | None = None
    limits: Limits = field(default_factory=Limits)
    exclude: Sequence[str] = ()
    channel_multiple: int = 1
    resources: Mapping[str, Resource] = field(default_factory=dict)
    removed_share: float | None = None
    selection: Selection = "greedy"
    depth: DepthSettings | None = None

    def __post_init__(self) -> None:
        OptimalSelection.of(self.selection)
        known = {*ALWAYS, *BUILT_IN, *self.resources}
        for argument, amounts in (("budget", self.budget), ("amount", self.amount or {})):
            check_amounts(amounts, argument)
            check_names(amounts, known, argument)

    @classmethod
    def of(
        cls,
        budget: Mapping[str, float] | PruningPolicy,
        default_limits: Limits | None = None,
        **arguments: Unpack[PolicyArguments],
    ) -> PruningPolicy:
        """Return ``budget`` if it is a policy, else the policy that the short spelling means.

        Args:
            budget: a policy, or the budget of one.
            default_limits: the limits if ``arguments`` have none.
            arguments: see :class:`PolicyArguments`.

        Raises:
            ValueError: there are arguments beside a whole policy, or ``budget`` is neither a policy nor a mapping.

        Example:
            >>> PruningPolicy.of({"macs": 0.5}, channel_multiple=8).channel_multiple
            8
        """
        chosen = {name: value for name, value in arguments.items() if not _is_default(name, value)}
        if isinstance(budget, PruningPolicy):
            if chosen:
                raise ValueError(f"{', '.join(sorted(chosen))}: set this in the PruningPolicy, not beside it")
            return budget
        defaults = {} if default_limits is None else {"limits": default_limits}
        check_amounts(budget, "budget")
        return PruningPolicy(dict(budget), **{**defaults, **chosen})  # type: ignore[arg-type]

    def with_budget(self) -> PruningPolicy:
        """Return this policy, whose budget has to name what must remain; slimming also works without one.

        Raises:
            ValueError: the budget is empty.
        """
        if not self.budget:
            raise ValueError("the budget is empty: name what must remain, such as {'macs': 0.5}")
        return self

    def trace(self, model: nn.Module, example: Example) -> ChannelGraph:
        """Trace ``model`` and return its graph with all resources of this policy."""
        named = {*self.budget, *(self.amount or ())} & BUILT_IN.keys()
        resources = {**{name: BUILT_IN[name] for name in sorted(named)}, **self.resources}
        return trace(model, *example[0], **example[1]).with_resources(resources)

    def plan(
        self,
        graph: ChannelGraph,
        importance: Any,
        dense: DenseSizes,
        blocks: Mapping[str, float] | None = None,
        loss_of: PlanLoss | None = None,
    ) -> Plan:
        """Select the units of the next step, and the blocks that vanish, of those whose scores are given.

        A plan that meets the budget may be measured, and made again, see :class:`MeasuredResource`.

        Args:
            graph: of the present network.
            importance: of its units.
            dense: sizes of the dense network.
            blocks: scores of its residual blocks.
            loss_of: what the network loses by a plan; decides how many blocks vanish, if the policy leaves that open
                and does not compare by scores.
        """
        if blocks and loss_of is not None and self.chooses_number:
            fixed = self._with_number(graph, importance, dense, blocks, loss_of)
            return fixed.plan(graph, importance, dense, blocks)
        plan_of: Callable[[ChannelGraph], Plan] = partial(
            self._predicted, importance=importance, dense=dense, blocks=blocks
        )
        for name, resource in self.resources.items():
            if name in self.budget and isinstance(resource, MeasuredResource):
                plan_of = partial(resource.settle, plan_of=plan_of, resource=name)
        plan = plan_of(graph)
        return plan if self.removed_share is None else self._on_the_way(plan, dense)

    @property
    def chooses_number(self) -> bool:
        """Whether the number of blocks that vanish is to be found by comparing networks."""
        return self.depth is not None and self.depth.blocks is None and self.depth.compare == "repaired"

    def _with_number(
        self,
        graph: ChannelGraph,
        importance: Any,
        dense: DenseSizes,
        blocks: Mapping[str, float],
        loss_of: PlanLoss,
    ) -> PruningPolicy:
        """Return this policy with the number of blocks by which least is lost, the same in all processes."""
        assert self.depth is not None
        number = from_first(
            lambda: len(self._predicted(graph, importance, dense, blocks, loss_of=loss_of).blocks)
        )
        gone = len(vanished_blocks(blocks_of(graph).model))
        return replace(self, depth=replace(self.depth, blocks=gone + number))

    def _predicted(
        self,
        graph: ChannelGraph,
        importance: Any,
        dense: DenseSizes,
        blocks: Mapping[str, float] | None = None,
        loss_of: PlanLoss | None = None,
    ) -> Plan:
        """Select by what is predicted of each resource."""
        rules: dict[str, Any] = {
            "amount": self.amount if self.removed_share is None else None,
            "limits": self.limits,
            "exclude": self.exclude,
            "channel_multiple": self.channel_multiple,
            "dense": dense,
            "selection": self.selection,
        }
        if blocks and self.depth is not None:
            goal = self._goal(dense)
            return select_with_depth(graph, importance, blocks, goal, self.depth, loss_of=loss_of, **rules)
        return select(graph, importance, self._goal(dense), **rules)

    def _goal(self, dense: DenseSizes) -> Mapping[str, float]:
        """Return the share of each resource that may remain after the next step."""
        if self.removed_share is None or self.removed_share == 1:
            return self.budget
        targets = resolve(self.budget, dense.costs, "budget")
        return {
            r: 1 - self.removed_share * max(0, 1 - target / (dense.costs[r] or 1))
            for r, target in targets.items()
        }

    def _on_the_way(self, plan: Plan, dense: DenseSizes) -> Plan:
        """Restate a plan against the budget, which was selected against the goal of its step."""
        targets = resolve(self.budget, dense.costs, "budget")
        costs = {r: replace(change, target=targets.get(r)) for r, change in plan.costs.items()}
        plan = replace(plan, costs=costs)
        only_step_is_done = plan.stopped == "budget" and not plan.reached
        return replace(plan, stopped="amount") if only_step_is_done else plan

    def without_depth(self, owner: str) -> PruningPolicy:
        """Return this policy; raise ValueError if it lets blocks vanish, which ``owner`` does not do."""
        if self.depth is not None:
            raise ValueError(f"{owner} removes channels only: leave depth out, or take FilterPruningCallback")
        return self

    def check(self, graph: ChannelGraph) -> None:
        """Raise ValueError if this policy is invalid for the dense network of ``graph``, or its budget too low."""
        dense = DenseSizes.of(graph)
        resolve(self.amount or {}, dense.costs, "amount")
        smallest = graph if self.depth is None else smallest_network(graph, self.budget, self.depth)
        check_budget(
            smallest,
            self.budget,
            limits=self.limits,
            exclude=self.exclude,
            channel_multiple=self.channel_multiple,
            dense=dense,
        )
        if OptimalSelection.of(self.selection) is not None and self.budget and self.depth is None:
            self._check_program(graph)

    def _check_program(self, graph: ChannelGraph) -> None:
        """Raise ValueError if no plan meets all budgets at once, although each alone can be met."""
        policy, equal = replace(self, amount=None, removed_share=None), np.zeros(graph.num_units)
        for selection in ("greedy", self.selection):  # what the first finds need not be searched for
            plan = replace(policy, selection=selection)._predicted(graph, equal, DenseSizes.of(graph))
            if plan.stopped != "limits":
                return
        raise ValueError(unreachable(plan))

    def met_resources(self, graph: ChannelGraph, dense: DenseSizes) -> set[str]:
        """Return the resources whose budget the network of ``graph`` meets."""
        targets = resolve(self.budget, dense.costs, "budget")
        return {resource for resource, target in targets.items() if graph.cost(resource) <= target}

    def is_met(self, graph: ChannelGraph, dense: DenseSizes) -> bool:
        """Return whether the network of ``graph`` meets the whole budget."""
        return self.met_resources(graph, dense) == self.budget.keys()

    def predict(self, graph: ChannelGraph, model: nn.Module) -> Plan:
        """Return the plan predicted with L2 scores, all in one step, to check the budget before training."""
        return replace(self, amount=None).plan(graph, L2()(graph, model, {}), DenseSizes.of(graph))


def with_depth(policy: PruningPolicy, depth: bool | DepthSettings | None) -> PruningPolicy:
    """Return a policy with what an argument ``depth`` says of residual blocks.

    Raises:
        ValueError: both say something, or ``depth`` is something else.
    """
    settings = DepthSettings.of(depth)
    if settings is not None and policy.depth is not None:
        raise ValueError("depth: set this in the PruningPolicy, not beside it")
    return policy if settings is None else replace(policy, depth=settings)


def _is_default(name: str, value: Any) -> bool:
    """Whether an argument of a callback leaves the policy's field ``name`` at its default."""
    if value is None or name == "limits":
        return value is None
    defaults = {"channel_multiple": 1, "selection": "greedy"}
    return value == defaults[name] if name in defaults else len(value) == 0
