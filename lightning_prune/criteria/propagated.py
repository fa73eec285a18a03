"""Importance propagated backwards from a unit's consumers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from lightning_prune.criteria.base import NO_STATISTICS, Importance, Statistics, Values
from lightning_prune.criteria.reduction import by_mean, plain
from lightning_prune.criteria.wrappers import Wrapper
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.ids import Units

__all__ = ["Propagated", "propagate"]


@dataclass(frozen=True)
class Propagated(Wrapper):
    """Any criterion, mixed with the importance of each unit's consumers by one backward sweep over the graph.

    After NISP (Yu et al., CVPR 2018), which starts from a score of the final response and does not mix.

    Args:
        criterion: any criterion or plain function; the sweep starts from its scores at the outputs.
        weight: of the propagated score against the criterion itself, in [0, 1].

    Raises:
        ValueError: the weight is out of range.

    Example:
        >>> import torch
        >>> from lightning_prune import one_shot
        >>> from lightning_prune.criteria import L2
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(net, torch.zeros(1, 1, 8, 8), {"macs": 0.5}, Propagated(L2(), weight=0.5))
        >>> net[0].out_channels
        4
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        return propagate(graph, model, self.inner_importance(graph, model, statistics), self.weight)


def propagate(graph: ChannelGraph, model: nn.Module, base: Importance, weight: float) -> Importance:
    """Return ``(1 - weight) * base_u + weight * sum_k share_ku * importance_k`` over the filters k that read unit u.

    ``share_ku`` is the share of ``|W_k|`` on unit u: each filter distributes its whole importance over its inputs.
    Which filter reads which unit follows from the graph's bindings, so concatenations, residuals, groups, depthwise
    layers and attention need no rules of their own. Each layer is visited once, the last executed first. ``base``
    is divided by its mean; infinite values (outputs) are 1 in the sweep. A unit that no weight reads keeps its base
    importance.

    Args:
        graph: the units, and the order in which layers run.
        model: the traced module, for its weights.
        base: shape (num_units,).
        weight: in [0, 1].

    Returns:
        Shape (num_units,); infinite where ``base`` is.

    Example:
        >>> import torch
        >>> from lightning_prune.graph.costs import Term
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 1.0]]))
        >>> bindings = {"weight": {0: np.array([2]), 1: np.array([0, 1])}}
        >>> terms = {"macs": [Term("weight", 1, (np.array([2]), np.array([0, 1])))]}
        >>> graph = ChannelGraph(3, bindings, {"weight": np.array([2])}, {"weight": 0}, {}, terms)
        >>> propagate(graph, model, np.array([1.0, 1.0, np.inf]), weight=1.0)
        array([0.75, 0.25,  inf])
    """
    scores = np.where(np.isfinite(base), by_mean(base), 1.0)
    fed, read = np.zeros(graph.num_units), np.zeros(graph.num_units, dtype=bool)
    for name in reversed(execution_order(graph)):
        importance = np.where(read, (1 - weight) * scores + weight * fed, scores)
        for units, handed_on in _distributed(graph, model, name, importance[graph.layers[name]]):
            fed += np.bincount(units, weights=handed_on, minlength=graph.num_units)
            read[units] = True
    mixed = np.where(read, (1 - weight) * scores + weight * fed, scores)
    return np.where(np.isfinite(base), mixed, np.inf)


def _distributed(
    graph: ChannelGraph, model: nn.Module, name: str, importance: Values
) -> list[tuple[Units, Values]]:
    """Distribute the importance of a layer's filters over the units that they read, by dimension of its weight."""
    dim, parts = graph.filter_dims[name], []
    weight = model.get_parameter(name).detach().abs()
    for other, units in graph.bindings.get(name, {}).items():
        if other != dim:
            pairs = weight.movedim((dim, other), (0, 1))
            matrix = plain(pairs.reshape(*pairs.shape[:2], -1).sum(2))
            total = matrix.sum(1, keepdims=True)
            parts.append((units, importance @ (matrix / np.where(total == 0, 1.0, total))))
    return parts


def execution_order(graph: ChannelGraph) -> list[str]:
    """Return the layers in the order of their first execution; layers without MACs come first, as registered."""
    modules = {name.rpartition(".")[0]: name for name in graph.layers}
    executed: dict[str, None] = {}
    for term in graph.terms.get("macs", ()):
        if (name := term.layer if term.layer in graph.layers else modules.get(term.layer)) is not None:
            executed.setdefault(name)
    return [*(name for name in graph.layers if name not in executed), *executed]
