"""Importance per cost, and the marginal cost of units."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from lightning_prune.criteria.base import NO_STATISTICS, CriterionLike, Importance, Statistics, Values
from lightning_prune.criteria.wrappers import Wrapper, blind_to
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term

__all__ = ["CostAware", "marginal_costs"]


@dataclass(frozen=True)
class CostAware(Wrapper):
    """Importance per cost: ``importance / marginal cost ** gamma``.

    The marginal cost of a unit is what its removal alone saves, as a share of the present network, summed over the
    resources. A unit that saves nothing is given the cost of the cheapest other unit. Importance must not be
    negative, since dividing would then reverse the ranking.

    In training, a resource whose budget is met is ignored from the next cut on, so that it no longer steers the
    ranking; a resource without a budget is always used.

    Args:
        criterion: any criterion or plain function.
        gamma: 0 ignores costs, 1 ranks by importance per cost.
        resources: resource -> its weight; any resource of the graph, those of ``with_resources`` included.

    Raises:
        ValueError: a negative gamma or weight; when called: negative importance, or an unknown resource.

    Example:
        >>> terms = {"macs": [Term("a", 1, (np.array([0]),)), Term("b", 3, (np.array([1]),))]}
        >>> graph = ChannelGraph(2, {}, {"a": np.array([0]), "b": np.array([1])}, {"a": 0, "b": 0}, {}, terms)
        >>> CostAware(lambda graph, model, statistics: np.array([1.0, 2.0]))(graph, nn.Identity())
        array([4.        , 2.66666667])
    """

    gamma: float = 1.0
    resources: Mapping[str, float] = field(default_factory=lambda: {"macs": 1.0})

    def __post_init__(self) -> None:
        weights = [self.gamma, *self.resources.values()]
        if not all(weight >= 0 for weight in weights) or not any(self.resources.values()):
            raise ValueError(
                f"gamma and weights of resources must be 0 or more, one weight above it; got gamma={self.gamma}, "
                f"resources={dict(self.resources)}"
            )

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        scores = self.inner_importance(graph, model, statistics)
        if (scores[graph.prunable] < 0).any():
            raise ValueError("CostAware divides importance by cost, which needs importance of 0 or more")
        shares = [w * marginal_costs(graph, r) / max(graph.cost(r), 1) for r, w in self.resources.items()]
        costs = np.sum(shares, axis=0)
        cheapest = min(costs[graph.prunable][costs[graph.prunable] > 0], default=1.0)
        return scores / np.where(costs > 0, costs, cheapest) ** self.gamma

    def without(self, resources: Collection[str]) -> CriterionLike:
        """Return the same criterion without ``resources``; the inner one alone if no other resource has a weight."""
        inner = blind_to(self.criterion, resources)
        others = {name: weight for name, weight in self.resources.items() if name not in resources}
        return replace(self, criterion=inner, resources=others) if any(others.values()) else inner


def marginal_costs(graph: ChannelGraph, resource: str) -> Values:
    """Return what the removal of each unit alone saves, exactly. Shape (num_units,).

    Args:
        graph: the units and their costs.
        resource: ``"macs"``, ``"params"``, or another resource of the graph; its unit is that of the result.

    Raises:
        ValueError: the resource is unknown.

    Example:
        >>> terms = {"macs": [Term("a", 1, (np.array([0]),)), Term("b", 3, (np.array([1]),))]}
        >>> graph = ChannelGraph(2, {}, {"a": np.array([0]), "b": np.array([1])}, {"a": 0, "b": 0}, {}, terms)
        >>> marginal_costs(graph, "macs").tolist()
        [1.0, 3.0]
    """
    graph.cost(resource)  # raises for an unknown resource, and names those there are
    saved = np.zeros(graph.num_units)
    for term in graph.terms[resource]:
        saved += _saved(term, graph.num_units)
    return saved


def _saved(term: Term, num_units: int) -> Values:
    """Return what each unit's removal saves in one term of the cost."""
    if term.function is not None:
        return _saved_of_function(term, num_units)
    remaining, whole = np.ones(num_units), 1
    for factor in term.factors:
        remaining *= len(factor) - np.bincount(factor, minlength=num_units)
        whole *= len(factor)
    return term.scale * (whole - remaining)


def _saved_of_function(term: Term, num_units: int) -> Values:
    """Call the cost function once per combination of how often a unit occurs in the term's factors."""
    saved = np.zeros(num_units)
    involved = np.unique(np.concatenate([*term.factors, np.empty(0, np.int64)]))
    sizes = np.array([len(factor) for factor in term.factors], dtype=np.int64)
    uses = [np.bincount(factor, minlength=num_units)[involved] for factor in term.factors]
    if uses:
        kinds, inverse = np.unique(np.stack(uses), axis=1, return_inverse=True)
        costs = np.array([term.cost((sizes - kind).tolist()) for kind in kinds.T])
        saved[involved] = term.cost(sizes.tolist()) - costs[inverse.ravel()]
    return saved
