"""Which channels a penalty has made superfluous, and when they go (level 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune.criteria.base import NOTHING, Importance, Statistics, Values, check_importance
from lightning_prune.criteria.reduction import plain, reduced
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.selection.select import spent
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.slimming.penalty import slimmable
from lightning_prune.tracing.ids import Units

__all__ = ["FixedScores", "SlimmingPolicy", "scale_sizes"]


@dataclass(frozen=True)
class FixedScores:
    """A criterion whose importance is known already, shape (num_units,)."""

    values: Importance
    statistic = None

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit."""
        return self.values


def scale_sizes(
    graph: ChannelGraph, scales: Mapping[str, Units], sources: Iterable[Mapping[str, Tensor]]
) -> Values:
    """The largest ``|gamma|`` of each unit, over its scales and over the ``sources``: model and moving averages.

    Returns:
        Shape (num_units,); infinite (never to go) for units without a scale that is slimmed.

    Example:
        >>> import torch
        >>> scales = {"a.weight": np.array([0, 1]), "b.weight": np.array([1, -1])}
        >>> gammas = {"a.weight": torch.tensor([0.5, -0.25]), "b.weight": torch.tensor([-2.0, 0.0])}
        >>> scale_sizes(ChannelGraph(3, {}, {}, {}, {}, {}), scales, [gammas])
        array([0.5, 2. , inf])
    """
    pieces = [
        (units[units >= 0], plain(held[name].abs())[units >= 0])
        for held in sources
        for name, units in scales.items()
    ]
    return reduced(graph, pieces, "max")


@dataclass(frozen=True)
class SlimmingPolicy(PruningPolicy):
    """Units go whose scales are all at or below ``threshold``; in the ``final`` shrink also what the budget asks.

    Importance is the size of a unit's scales, see :func:`scale_sizes`.

    Attributes:
        threshold: of ``|gamma|``.
        norms: names or globs of the norms whose scales count, all if there are none.
        final: whether this is the last shrink. If there is a budget, it is met then, smallest scales first.
    """

    threshold: float = 1e-3
    norms: Sequence[str] = ()
    final: bool = False

    def scales(self, graph: ChannelGraph, model: nn.Module) -> dict[str, Units]:
        """The scales that are slimmed, see :func:`~lightning_prune.slimming.penalty.slimmable`."""
        return slimmable(graph, model, self.norms, self.exclude)

    def plan(self, graph: ChannelGraph, importance: Any, dense: DenseSizes) -> Plan:
        """The units of this shrink."""
        sizes = check_importance(graph, importance)
        if not (self.final and self.budget):
            sizes = np.where(sizes <= self.threshold, sizes, np.inf)
        plan = super().plan(graph, sizes, dense) if self.budget else self._all(graph, sizes, dense)
        more = not self.final and plan.stopped == "limits"  # the next epoch masks others
        return replace(plan, stopped="amount") if more else plan

    def foreseen(self, graph: ChannelGraph, model: nn.Module) -> Plan:
        """How far the final shrink leads if all scales are alike."""
        scales = self.scales(graph, model)
        alike = scale_sizes(graph, scales, [{name: model.get_parameter(name) for name in scales}])
        return replace(self, final=True).plan(graph, alike, DenseSizes.of(graph))

    def _all(self, graph: ChannelGraph, sizes: Values, dense: DenseSizes) -> Plan:
        """Everything finite, as far as limits allow."""
        stock = UnitPool(graph, self.limits, dense, self.channel_multiple)
        ranked = [
            unit for unit in np.lexsort((np.arange(len(sizes)), sizes)).tolist() if np.isfinite(sizes[unit])
        ]
        taken = [gone for unit in ranked for gone in stock.offer(unit)]
        return Plan(np.array(taken, dtype=np.int64), spent(graph, taken, dense, {}), "budget", stock.closed)


def masked_share(plan: Plan, resource: str = "macs") -> float:
    """What a plan takes away of a resource, as a share of the dense network."""
    cost = plan.costs[resource]
    return (cost.before - cost.after) / max(cost.dense, 1)
