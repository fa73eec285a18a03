"""Output energy: the share of its consumers' output variance that each unit carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from lightning_prune.criteria.base import NO_STATISTICS, Importance, Observer, Statistics, Values
from lightning_prune.criteria.consumers import Consumer, ConsumerInputs, find_consumers
from lightning_prune.criteria.reduction import (
    Normalise,
    by_mean,
    filter_norms,
    groups,
    norm_scales,
    normalised,
    plain,
)
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["OutputEnergy", "group_scaled", "output_energy", "weight_energy"]


def output_energy(graph: ChannelGraph, model: nn.Module, statistics: Statistics) -> Importance:
    """Return ``A_u = sum over consumers c of ||W_c[:, u]||^2 * Var(x_cu) / E_c``, shape (num_units,).

    ``x_cu`` is what consumer c reads of unit u, after norm, activation and concatenation; ``E_c`` is the sum of the
    same product over all inputs of c, which is the variance of its outputs if inputs and taps are uncorrelated.
    Variance, not energy, since whatever is constant can be moved into a bias. The shares have no unit, and do not
    change where a filter is scaled and its norm or its consumers make up for it. Units that no layer reads: infinite.

    Args:
        graph: the units.
        model: the traced module, for its weights.
        statistics: of :class:`~lightning_prune.criteria.consumers.ConsumerInputs`. For a consumer that was not
            observed all its inputs are taken to have the same variance.

    Raises:
        ValueError: nothing was observed.
    """
    consumers = find_consumers(graph, model)
    if consumers and not any(consumer.key in statistics for consumer in consumers):
        raise ValueError(
            "output energy needs the variances of what layers read, but no layer was observed: did any batch run? "
            "Forward hooks do not run inside torch.compile; there, use a separate pass (statistics='pass')"
        )
    return _shares(graph, consumers, lambda consumer: consumer.energy(statistics.get(consumer.key)))


def weight_energy(graph: ChannelGraph, model: nn.Module) -> Importance:
    """Return ``P_u = sum over consumers c of ||W_c[:, u]||^2 g_u^2 / sum_j ||W_c[:, j]||^2 g_j^2``.

    The output energy that the weights alone predict: ``g_u^2`` stands for the variance of the unit. It is the sum of
    the squared scales (gamma) of the norms that the unit passes; without a norm, of its filters' squared norms.

    Args:
        graph: the units.
        model: the traced module, for its weights.
    """
    gains = squared_gains(graph, model)
    return _shares(graph, find_consumers(graph, model), lambda c: c.energy() * gains[c.units])


def squared_gains(graph: ChannelGraph, model: nn.Module) -> Values:
    """Return the squared scale of each unit: of its norms, else of its filters, else 1; shape (num_units,)."""

    def total(pieces: dict[str, Values], units: dict[str, np.ndarray]) -> Values:
        out = np.zeros(graph.num_units)
        for name, values in pieces.items():
            out += np.bincount(units[name], weights=values**2, minlength=graph.num_units)
        return out

    scales = norm_scales(graph, model)
    normed = total({name: plain(model.get_parameter(name)) for name in scales}, scales)
    filters = total(filter_norms(graph, model, 2), graph.layers)
    passes = (
        np.bincount(np.concatenate([*scales.values(), np.empty(0, np.int64)]), minlength=graph.num_units) > 0
    )
    has_filter = np.isin(np.arange(graph.num_units), np.concatenate(list(graph.layers.values())))
    return np.where(passes, normed, np.where(has_filter, filters, 1.0))


def _shares(
    graph: ChannelGraph, consumers: list[Consumer], energy: Callable[[Consumer], Values]
) -> Importance:
    """Return the sum over consumers of each unit's share of ``energy``; infinite for units without a consumer."""
    shares, number = np.zeros(graph.num_units), np.zeros(graph.num_units, np.int64)
    for consumer in consumers:
        values = energy(consumer)
        total = values.sum()
        shares += np.bincount(consumer.units, values / (total if total > 0 else 1.0), graph.num_units)
        number += np.bincount(consumer.units, minlength=graph.num_units)
    return np.where(number > 0, shares, np.inf)


def group_scaled(graph: ChannelGraph, importance: Importance, beta: float) -> Importance:
    """Return importance over its mean in each group of coupled layers, times ``|group| ** (beta - 1)``.

    With beta 1 the units of a wide and of a narrow group are worth the same on average, with beta 0 the groups are:
    the smaller beta, the more is removed from wide ones.

    Example:
        >>> layers = {"a": np.array([0, 1]), "b": np.array([2])}
        >>> graph = ChannelGraph(3, {}, layers, {"a": 0, "b": 0}, {}, {})
        >>> group_scaled(graph, np.array([1.0, 3.0, 9.0]), beta=0.0)
        array([0.25, 0.75, 1.  ])
    """
    labels = groups(graph)
    size = np.bincount(labels)[labels]
    return by_mean(importance, labels) * size ** (beta - 1.0)


@dataclass(frozen=True)
class OutputEnergy:
    """Output energy; see :func:`output_energy` for the formula. It needs batches, but neither labels nor gradients.

    Args:
        normalise: ``"none"`` for the shares themselves, or by the mean over ``"layer"``, ``"group"`` or ``"global"``.

    Raises:
        ValueError: when called: there are no statistics.

    Example:
        >>> import torch
        >>> from lightning_prune import one_shot
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(
        ...     net, torch.zeros(1, 1, 8, 8), {"macs": 0.5}, OutputEnergy(), [torch.randn(4, 1, 8, 8)]
        ... )
        >>> net[0].out_channels
        4
    """

    normalise: Normalise = "none"

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer:
        """Return an observer of the variances of what layers read."""
        return ConsumerInputs(graph, model)

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        return normalised(graph, output_energy(graph, model, statistics), self.normalise)
