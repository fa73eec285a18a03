"""Criteria made from others: normalised, aware of costs, propagated through the graph (level 3).

Each takes any criterion, functions and lambdas included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from lightning_prune.criteria.activation_deviation import ActivationDeviation
from lightning_prune.criteria.base import NOTHING, Criterion, Importance, Statistics, check_importance
from lightning_prune.criteria.reduction import Normalise, normalised
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.utils.arguments import check_option

__all__ = [
    "Normalised",
    "blind_to",
]


@dataclass(frozen=True)
class Wrapper:
    """Passes on what the inner criterion wants to have gathered."""

    criterion: Criterion

    @property
    def statistic(self) -> Any:
        """As the inner criterion's."""
        return getattr(self.criterion, "statistic", ActivationDeviation)

    @property
    def gather(self) -> Callable[..., Any] | None:
        """As the inner criterion's, if it has one."""
        return getattr(self.criterion, "gather", None)

    def without(self, resources: Collection[str]) -> Criterion:
        """The same, blind to what ``resources`` cost."""
        return cast(Criterion, replace(self, criterion=blind_to(self.criterion, resources)))

    def base(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics) -> Importance:
        """The inner criterion's importance, checked."""
        return check_importance(graph, self.criterion(graph, model, statistics))


def blind_to(criterion: Criterion, resources: Collection[str]) -> Criterion:
    """The criterion once the budgets of ``resources`` are met: what these cost matters no more, if it ever did."""
    return criterion.without(resources) if isinstance(criterion, Wrapper) else criterion


@dataclass(frozen=True)
class Normalised(Wrapper):
    """Any criterion, as multiples of the mean over each layer, each group of coupled layers, or the network.

    Example:
        >>> graph = ChannelGraph(2, {}, {"a": np.arange(2)}, {"a": 0}, {}, {})
        >>> Normalised(lambda graph, model, statistics: np.array([1.0, 3.0]), "layer")(graph, nn.Identity())
        array([0.5, 1.5])
    """

    by: Normalise = "layer"

    def __post_init__(self) -> None:
        check_option("by", self.by, Normalise)

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        return normalised(graph, self.base(graph, model, statistics), self.by)
