"""Criteria made from others: normalised, aware of costs, propagated through the graph (level 3).

Each takes any criterion, functions and lambdas included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from torch import nn

from lightning_prune.criteria.scores import (
    NOTHING,
    Criterion,
    Importance,
    Normalise,
    Values,
    by_mean,
    check_option,
    normalised,
    plain,
)
from lightning_prune.deviation import ActivationDeviation
from lightning_prune.graph import ChannelGraph, Term, Units
from lightning_prune.selection import check_importance
from lightning_prune.statistics import Statistics

__all__ = ["CostAware", "Normalised", "Propagated", "blind_to", "marginal_costs", "propagate"]


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


@dataclass(frozen=True)
class CostAware(Wrapper):
    """Importance per cost: ``importance / marginal cost ** gamma``.

    The marginal cost of a unit is what goes if it alone goes, as a share of the network as it is, summed over
    resources. Where that is nothing, as much as the cheapest other unit's. Importance must not be negative, else
    dividing would turn the ranking round.

    While training, a resource whose budget is met counts no more from the next cut on (else its weight would drive
    the ranking to where nothing needs to go); one that has no budget always counts.

    Args:
        criterion: any.
        gamma: 0 ignores costs, 1 ranks by importance per cost.
        resources: resource -> its weight; any that the graph counts, so also those of ``with_resources``.

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

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        scores = self.base(graph, model, statistics)
        if (scores[graph.prunable] < 0).any():
            raise ValueError("CostAware divides importance by cost, which needs importance of 0 or more")
        shares = [w * marginal_costs(graph, r) / max(graph.cost(r), 1) for r, w in self.resources.items()]
        costs = np.sum(shares, axis=0)
        cheapest = min(costs[graph.prunable][costs[graph.prunable] > 0], default=1.0)
        return scores / np.where(costs > 0, costs, cheapest) ** self.gamma

    def without(self, resources: Collection[str]) -> Criterion:
        """The same, blind to what ``resources`` cost; the inner criterion alone if nothing else has a weight."""
        inner = blind_to(self.criterion, resources)
        left = {name: weight for name, weight in self.resources.items() if name not in resources}
        return replace(self, criterion=inner, resources=left) if any(left.values()) else inner


def marginal_costs(graph: ChannelGraph, resource: str) -> Values:
    """What each unit costs if it alone goes; exact. Shape (num_units,).

    Raises:
        ValueError: the resource is unknown.
    """
    graph.cost(resource)  # knows what to say about a resource that there is not
    saved = np.zeros(graph.num_units)
    for term in graph.terms[resource]:
        saved += _saved(term, graph.num_units)
    return saved


def _saved(term: Term, num_units: int) -> Values:
    if term.function is not None:
        return _saved_of_function(term, num_units)
    left, whole = np.ones(num_units), 1
    for factor in term.factors:
        left *= len(factor) - np.bincount(factor, minlength=num_units)
        whole *= len(factor)
    return term.scale * (whole - left)


def _saved_of_function(term: Term, num_units: int) -> Values:
    """One call for each way in which a unit takes part in the term."""
    saved = np.zeros(num_units)
    taking_part = np.unique(np.concatenate([*term.factors, np.empty(0, np.int64)]))
    sizes = np.array([len(factor) for factor in term.factors], dtype=np.int64)
    uses = [np.bincount(factor, minlength=num_units)[taking_part] for factor in term.factors]
    if uses:
        kinds, inverse = np.unique(np.stack(uses), axis=1, return_inverse=True)
        costs = np.array([term.cost((sizes - kind).tolist()) for kind in kinds.T])
        saved[taking_part] = term.cost(sizes.tolist()) - costs[inverse.ravel()]
    return saved


@dataclass(frozen=True)
class Propagated(Wrapper):
    """A unit matters as much as what it feeds: one backward sweep over the graph, mixed with any criterion.

    After NISP (Yu et al., CVPR 2018), which starts from a score of the final response and knows no mixture.

    Args:
        criterion: any; the propagated score starts from it at the outputs.
        weight: of what is propagated against the criterion itself, in [0, 1].

    Raises:
        ValueError: the weight is out of range.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        return propagate(graph, model, self.base(graph, model, statistics), self.weight)


def propagate(graph: ChannelGraph, model: nn.Module, base: Importance, weight: float) -> Importance:
    """``(1 - weight) * base_u + weight * sum_k share_ku * importance_k`` over the filters k that read unit u.

    ``share_ku`` is the share of ``|W_k|`` on unit u: a filter hands its importance on to what it reads, all of it.
    The graph's bindings say what reads what, so concatenations, residuals, groups, depthwise layers and attention
    need no rules here. Layers are visited once, the last executed first. ``base`` counts as multiples of its mean;
    where it is infinite (outputs) as 1 in the sweep. A unit that no weight reads has its base importance alone.

    Args:
        graph: the units, and the order in which layers run.
        model: the traced module, for its weights.
        base: shape (num_units,).
        weight: in [0, 1].

    Returns:
        Shape (num_units,); infinite where ``base`` is.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 1.0]]))
        >>> bindings = {"weight": {0: np.array([2]), 1: np.array([0, 1])}}
        >>> terms = {"macs": [Term("weight", 1, (np.array([2]), np.array([0, 1])))]}
        >>> graph = ChannelGraph(3, bindings, {"weight": np.array([2])}, {"weight": 0}, {}, terms)
        >>> propagate(graph, model, np.array([1.0, 1.0, np.inf]), weight=1.0)
        array([0.75, 0.25,  inf])
    """
    own = np.where(np.isfinite(base), by_mean(base), 1.0)
    fed, read = np.zeros(graph.num_units), np.zeros(graph.num_units, dtype=bool)
    for name in reversed(execution_order(graph)):
        importance = np.where(read, (1 - weight) * own + weight * fed, own)
        for units, handed in _handed(graph, model, name, importance[graph.layers[name]]):
            fed += np.bincount(units, weights=handed, minlength=graph.num_units)
            read[units] = True
    mixed = np.where(read, (1 - weight) * own + weight * fed, own)
    return np.where(np.isfinite(base), mixed, np.inf)


def _handed(
    graph: ChannelGraph, model: nn.Module, name: str, importance: Values
) -> list[tuple[Units, Values]]:
    """What a layer's filters hand on to the units that they read."""
    dim, found = graph.filter_dims[name], []
    weight = model.get_parameter(name).detach().abs()
    for other, units in graph.bindings.get(name, {}).items():
        if other != dim:
            pairs = weight.movedim((dim, other), (0, 1))
            matrix = plain(pairs.reshape(*pairs.shape[:2], -1).sum(2))
            total = matrix.sum(1, keepdims=True)
            found.append((units, importance @ (matrix / np.where(total == 0, 1.0, total))))
    return found


def execution_order(graph: ChannelGraph) -> list[str]:
    """Layers as they first run; those that cost nothing come first, as registered."""
    modules = {name.rpartition(".")[0]: name for name in graph.layers}
    seen: dict[str, None] = {}
    for term in graph.terms.get("macs", ()):
        if (name := term.layer if term.layer in graph.layers else modules.get(term.layer)) is not None:
            seen.setdefault(name)
    return [*(name for name in graph.layers if name not in seen), *seen]
