"""Output energy: the share of what its consumers compute that each unit carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.criteria.base import NO_STATISTICS, Importance, Observer, Statistics, Values
from lightning_prune.criteria.consumers import Consumer, ConsumerInputs, find_consumers
from lightning_prune.criteria.propagated import execution_order
from lightning_prune.criteria.reduction import Normalise, norm_scales, normalised, plain
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["OutputEnergy", "output_energy", "predicted_variances", "weight_energy"]


def output_energy(graph: ChannelGraph, model: nn.Module, statistics: Statistics) -> Importance:
    """Return the share of its consumers' output energy that each unit carries, shape (num_units,).

    ``A_u = sum over consumers c of the mean over their filters k of sum W_ku^2 * Var(x_cu) / E_k``, where ``x_cu`` is
    what c reads of unit u, after norm, activation and concatenation, and ``E_k`` the sum of the same product over all
    inputs of filter k: the variance of its output if inputs and taps are uncorrelated. Variance, since whatever is
    constant can be moved into a bias. Every filter of a consumer weighs the same, because a norm behind it may take
    its scale away. So the score has no unit, and does not change where a filter is scaled and its norm or its
    consumers make up for it. Units that no layer reads: infinite.

    Args:
        graph: the units.
        model: the traced module, for its weights.
        statistics: of :class:`~lightning_prune.criteria.consumers.ConsumerInputs`. For a consumer that was not
            observed all its inputs are taken to have the same variance.

    Raises:
        ValueError: nothing was observed.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> net[0].weight.data, net[2].weight.data = torch.ones(2, 1), torch.tensor([[2.0, 1.0]])
        >>> graph = trace(net, torch.zeros(1, 1))
        >>> with OutputEnergy().observer(graph, net) as inputs:
        ...     _ = net(torch.tensor([[1.0], [3.0]]))
        >>> output_energy(graph, net, inputs.compute())[graph.layers["0.weight"]].shape
        (2,)
    """
    consumers = find_consumers(graph, model)
    if consumers and not any(consumer.key in statistics for consumer in consumers):
        raise ValueError(
            "output energy needs the variances of what layers read, but no layer was observed: did any batch run? "
            "Forward hooks do not run inside torch.compile; there, use a separate pass (statistics='pass')"
        )
    return _shares(graph, consumers, lambda consumer: statistics.get(consumer.key))


def weight_energy(graph: ChannelGraph, model: nn.Module) -> Importance:
    """Return the share of its consumers' output energy that the weights alone predict for each unit.

    As :func:`output_energy`, with :func:`predicted_variances` in place of the measured ones.

    Args:
        graph: the units.
        model: the traced module, for its weights.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> net[0].weight.data, net[2].weight.data = torch.ones(2, 1), torch.tensor([[2.0, 1.0]])
        >>> graph = trace(net, torch.zeros(1, 1))
        >>> weight_energy(graph, net)[graph.layers["0.weight"]]  # 4 / (4 + 1), 1 / (4 + 1)
        array([0.8, 0.2])
    """
    variances = predicted_variances(graph, model)
    return _shares(graph, find_consumers(graph, model), lambda c: c.by_channel(variances[c.units]))


def predicted_variances(graph: ChannelGraph, model: nn.Module) -> Values:
    """Return the variance of each unit that the weights predict, shape (num_units,).

    The sum of the squared scales (gamma) of the norms that a unit passes; without a norm, the sum over its filters of
    ``sum_i W_ki^2 * Var_i``, with the variances predicted for the inputs, or 1 where these are no units.
    """
    out, scales = np.zeros(graph.num_units), norm_scales(graph, model)
    for name, units in scales.items():
        out += np.bincount(units, plain(model.get_parameter(name)) ** 2, graph.num_units)
    bare = ~np.isin(np.arange(graph.num_units), np.concatenate([np.empty(0, np.int64), *scales.values()]))
    for name in execution_order(graph):
        units = graph.layers[name]
        out += bare * np.bincount(units, _filter_variances(graph, model, name, out), graph.num_units)
    return np.where(out > 0, out, np.where(bare & ~_with_filters(graph), 1.0, 0.0))


def _filter_variances(graph: ChannelGraph, model: nn.Module, name: str, variances: Values) -> Values:
    """Return ``sum_i W_ki^2 * Var_i`` of each filter of a layer."""
    dim, weight = graph.filter_dims[name], model.get_parameter(name).detach().double().square()
    inputs = [other for other in graph.bindings.get(name, {}) if other != dim]
    if not inputs:
        return plain(weight.movedim(dim, 0).flatten(1).sum(1))
    squares = weight.movedim((dim, inputs[0]), (0, 1))
    return plain(squares.reshape(*squares.shape[:2], -1).sum(2)) @ variances[graph.bindings[name][inputs[0]]]


def _with_filters(graph: ChannelGraph) -> NDArray[np.bool_]:
    filters = np.concatenate([np.empty(0, np.int64), *graph.layers.values()])
    return np.isin(np.arange(graph.num_units), filters)


def _shares(
    graph: ChannelGraph, consumers: list[Consumer], variances: Callable[[Consumer], Values | None]
) -> Importance:
    """Return the sum over consumers of each unit's share; infinite for units without a consumer."""
    shares, number = np.zeros(graph.num_units), np.zeros(graph.num_units, np.int64)
    for consumer in consumers:
        shares += np.bincount(consumer.units, consumer.shares(variances(consumer)), graph.num_units)
        number += np.bincount(consumer.units, minlength=graph.num_units)
    return np.where(number > 0, shares, np.inf)


@dataclass(frozen=True)
class OutputEnergy:
    """Output energy; see :func:`output_energy` for the formula. It needs batches, but neither labels nor gradients.

    Args:
        normalise: ``"remaining"``, see :func:`~lightning_prune.criteria.reduction.remaining_shares`, ``"none"`` for
            the shares themselves, or by the mean over ``"layer"``, ``"group"``
            or ``"global"``.

    Raises:
        ValueError: when called: there are no statistics.

    Example:
        >>> import torch
        >>> from lightning_prune import one_shot
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(
        ...     net, torch.zeros(1, 1, 8, 8), {"macs": 0.5}, OutputEnergy(), [torch.randn(16, 1, 8, 8)]
        ... )
        >>> net[0].out_channels
        4
    """

    normalise: Normalise = "remaining"

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer:
        """Return an observer of the variances of what layers read."""
        return ConsumerInputs(graph, model)

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        return normalised(graph, output_energy(graph, model, statistics), self.normalise)
