"""Criteria made from other criteria: the common base class, and normalisation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import cast, get_args

from torch import nn

from lightning_prune.criteria.base import (
    NO_STATISTICS,
    CriterionLike,
    Importance,
    Observer,
    Statistics,
    as_criterion,
    check_importance,
)
from lightning_prune.criteria.reduction import Normalise, normalised
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.utils.arguments import check_choice

__all__ = ["Normalised", "Wrapper", "blind_to"]


@dataclass(frozen=True)
class Wrapper:
    """Base class of criteria that change the importance of an inner criterion, and observe what that observes.

    Args:
        criterion: any criterion or plain function.
    """

    criterion: CriterionLike

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer | None:
        """Return the inner criterion's observer."""
        return as_criterion(self.criterion).observer(graph, model)

    def without(self, resources: Collection[str]) -> CriterionLike:
        """Return the same criterion, which ignores the cost in ``resources``."""
        return cast(CriterionLike, replace(self, criterion=blind_to(self.criterion, resources)))

    def inner_importance(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics) -> Importance:
        """Return the inner criterion's importance.

        Raises:
            ValueError: it does not fit the graph.
        """
        return check_importance(graph, self.criterion(graph, model, statistics))


def blind_to(criterion: CriterionLike, resources: Collection[str]) -> CriterionLike:
    """Return a criterion that ignores the cost in ``resources``: for the time when their budgets are met.

    Args:
        criterion: a wrapper such as :class:`CostAware` loses these costs; any other criterion is returned as it is.
        resources: names of resources of the graph.

    Example:
        >>> from lightning_prune.criteria import L2, CostAware
        >>> blind_to(CostAware(L2(), resources={"macs": 1.0, "params": 1.0}), {"macs"}).resources
        {'params': 1.0}
    """
    return criterion.without(resources) if isinstance(criterion, Wrapper) else criterion


@dataclass(frozen=True)
class Normalised(Wrapper):
    """Any criterion, as multiples of the mean over each layer, each group of coupled layers, or the network.

    Args:
        criterion: any criterion or plain function.
        by: ``"layer"``, ``"group"`` (of coupled layers) or ``"global"``; ``"none"`` changes nothing.

    Example:
        >>> import numpy as np
        >>> graph = ChannelGraph(2, {}, {"a": np.arange(2)}, {"a": 0}, {}, {})
        >>> Normalised(lambda graph, model, statistics: np.array([1.0, 3.0]), "layer")(graph, nn.Identity())
        array([0.5, 1.5])
    """

    by: Normalise = "layer"

    def __post_init__(self) -> None:
        check_choice("by", self.by, get_args(Normalise))

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        return normalised(graph, self.inner_importance(graph, model, statistics), self.by)
