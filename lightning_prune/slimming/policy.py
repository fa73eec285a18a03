"""Selection by the scales of norms: which channels the penalty has made superfluous."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune.criteria.base import (
    NO_STATISTICS,
    Importance,
    ObservesNothing,
    Statistics,
    Values,
    check_importance,
)
from lightning_prune.criteria.reduction import plain, reduced
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.depth import PlanLoss
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.selection.select import resource_changes
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.slimming.penalty import slimmable
from lightning_prune.tracing.ids import Units

__all__ = ["FixedScores", "SlimmingPolicy", "scale_sizes"]


@dataclass(frozen=True)
class FixedScores(ObservesNothing):
    """Criterion that returns importance computed beforehand, shape (num_units,)."""

    values: Importance

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return the fixed importance."""
        return self.values


def scale_sizes(
    graph: ChannelGraph, scales: Mapping[str, Units], sources: Iterable[Mapping[str, Tensor]]
) -> Values:
    """Return the largest ``|gamma|`` of each unit, over its scales and over ``sources`` (model, moving averages).

    Returns:
        Shape (num_units,); infinite (never removed) for units without a slimmed scale.

    Example:
        >>> import torch
        >>> scales = {"a.weight": np.array([0, 1]), "b.weight": np.array([1, -1])}
        >>> gammas = {"a.weight": torch.tensor([0.5, -0.25]), "b.weight": torch.tensor([-2.0, 0.0])}
        >>> scale_sizes(ChannelGraph(3, {}, {}, {}, {}, {}), scales, [gammas])
        array([0.5, 2. , inf])
    """
    pieces = [
        (units[units >= 0], plain(gammas[name].abs())[units >= 0])
        for gammas in sources
        for name, units in scales.items()
    ]
    return reduced(graph, pieces, "max")


@dataclass(frozen=True)
class SlimmingPolicy(PruningPolicy):
    """Remove the units whose scales are all at or below a threshold; in the final shrink, meet the budget too.

    Importance is the size of a unit's scales, see :func:`scale_sizes`.

    Args:
        threshold: largest ``|gamma|`` of a unit that is removed.
        norms: names or globs of the norms whose scales are used; all norms if empty.
        final: whether this is the last shrink, which removes units above the threshold too if the budget requires it.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> net[1].weight.data[:3] = 0.0001
        >>> graph = trace(net, torch.zeros(2, 1, 8, 8))
        >>> importance = scale_sizes(graph, slimmable(graph, net), [net.state_dict()])
        >>> len(SlimmingPolicy(budget={"macs": 0.5}).plan(graph, importance, DenseSizes.of(graph)))
        3
    """

    threshold: float = 1e-3
    norms: Sequence[str] = ()
    final: bool = False

    @classmethod
    def from_policy(cls, policy: PruningPolicy, threshold: float, norms: Sequence[str]) -> SlimmingPolicy:
        """Return a slimming policy with the fields of a general one, except ``amount``: the threshold replaces it."""
        values = {entry.name: getattr(policy, entry.name) for entry in fields(PruningPolicy)}
        return cls(**{**values, "amount": None}, threshold=threshold, norms=norms)

    def scales(self, graph: ChannelGraph, model: nn.Module) -> dict[str, Units]:
        """Return the scales that are slimmed, see :func:`~lightning_prune.slimming.penalty.slimmable`."""
        return slimmable(graph, model, self.norms, self.exclude)

    def plan(
        self,
        graph: ChannelGraph,
        importance: Any,
        dense: DenseSizes,
        blocks: Mapping[str, float] | None = None,
        loss_of: PlanLoss | None = None,
    ) -> Plan:
        """Return the plan of this shrink.

        Args:
            graph: the graph of the network.
            importance: sizes of the units, see :func:`scale_sizes`, shape (num_units,).
            dense: sizes of the dense network, to which shares refer.
            blocks: ignored: slimming removes channels only.
            loss_of: ignored likewise.
        """
        sizes = check_importance(graph, importance)
        if not (self.final and self.budget):
            # Infinite sizes are never removed, so units above the threshold stay.
            sizes = np.where(sizes <= self.threshold, sizes, np.inf)
        # Of channels below the threshold all go, as far as the budget needs it: there is nothing to choose.
        policy = self if self.final else replace(self, selection="greedy")
        plan = (
            PruningPolicy.plan(policy, graph, sizes, dense)
            if self.budget
            else self._plan_all(graph, sizes, dense)
        )
        may_continue = not self.final and plan.stopped == "limits"  # later epochs may mask other units
        return replace(plan, stopped="amount") if may_continue else plan

    def predict(self, graph: ChannelGraph, model: nn.Module) -> Plan:
        """Predict the final shrink from the present scales, to check the budget before training."""
        scales = self.scales(graph, model)
        sizes = scale_sizes(graph, scales, [{name: model.get_parameter(name) for name in scales}])
        return replace(self, final=True).plan(graph, sizes, DenseSizes.of(graph))

    def _plan_all(self, graph: ChannelGraph, sizes: Values, dense: DenseSizes) -> Plan:
        """Return a plan that removes all units of finite size, smallest first, as far as limits allow."""
        pool = UnitPool(graph, self.limits, dense, self.channel_multiple)
        ranking = np.argsort(sizes, kind="stable")  # units of equal size in the order of their numbers
        finite = ranking[np.isfinite(sizes[ranking])].tolist()
        removed = [unit for candidate in finite for unit in pool.offer(candidate)]
        return Plan(
            np.array(removed, dtype=np.int64),
            resource_changes(graph, removed, dense, {}),
            "budget",
            pool.closed,
            graph.without_trace(),
        )


def masked_share(plan: Plan, resource: str = "macs") -> float:
    """Return the cost that a plan removes, as a share of the dense network's cost of this resource."""
    cost = plan.costs[resource]
    return (cost.before - cost.after) / max(cost.dense, 1)
