"""Alignment: units to remove so that the widths of layers become multiples of a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.optimal import OptimalSelection, sorted_units, units_at
from lightning_prune.selection.select import rank_units
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.selection.width_grids import width_choices
from lightning_prune.selection.width_program import WidthProgram

__all__ = ["least_surplus_units", "surplus_units"]


def surplus_units(
    graph: ChannelGraph,
    importance: NDArray[np.float64],
    layers: Sequence[str],
    multiple: int,
    limits: Limits,
    dense: DenseSizes,
) -> list[int]:
    """Return the least important units to remove so that each of the coupled ``layers`` has a multiple of filters.

    Args:
        graph: of the current network.
        importance: one score per unit; units with infinite scores stay. Shape (num_units,).
        layers: weights in ``graph.layers`` that share units.
        multiple: of filters.
        limits: how much of ``dense`` may be removed in all.
        dense: the sizes before any cut.

    Returns:
        Units; none if all widths are multiples already, or if not all of them can become multiples.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 11, 3), torch.nn.Conv2d(11, 1, 3))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> surplus_units(graph, np.arange(12.0), ["0.weight"], 4, Limits(), DenseSizes.of(graph))
        [0, 1, 2]
    """
    filters = {layer: graph.layers[layer] for layer in layers}
    widths = {layer: len(units) for layer, units in filters.items()}
    units = np.intersect1d(np.concatenate(list(filters.values())), graph.prunable)
    units = rank_units(units, importance)
    pool, surplus = UnitPool(graph, limits, dense, multiple), list[int]()
    for unit in units.tolist():
        if any(widths[layer] % multiple for layer in _layers_with(unit, filters)):
            removed = pool.offer(unit)
            surplus += removed
            for layer, layer_filters in filters.items():
                widths[layer] -= int(np.isin(layer_filters, removed).sum())
    prunable_layers = [layer for layer in layers if np.isin(filters[layer], units).any()]
    return surplus if not any(widths[layer] % multiple for layer in prunable_layers) else []


def least_surplus_units(
    settings: OptimalSelection,
    graph: ChannelGraph,
    importance: NDArray[np.float64],
    layers: Sequence[str],
    multiple: int,
    limits: Limits,
    dense: DenseSizes,
) -> list[int]:
    """Return what :func:`surplus_units` returns, with the least importance in all.

    Where layers share some of their units, many numbers of units make all widths multiples; the best are found by an
    integer program, and also those that taking units one by one would not find.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 11, 3), torch.nn.Conv2d(11, 1, 3))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> scores, dense = np.arange(12.0), DenseSizes.of(graph)
        >>> least_surplus_units(OptimalSelection(), graph, scores, ["0.weight"], 4, Limits(), dense)
        [0, 1, 2]
    """
    units = np.intersect1d(np.concatenate([graph.layers[layer] for layer in layers]), graph.prunable)
    ranking, pool = rank_units(units, importance).tolist(), UnitPool(graph, limits, dense)
    choices = width_choices(pool, ranking, importance)
    widths = WidthProgram(graph, pool, choices, {})
    widths.add_minima()
    for layer in (layer for layer in layers if np.isin(graph.layers[layer], ranking).any()):
        filters = graph.layers[layer]
        widths.program.multiple_of(widths.cost([Term(layer, 1, (filters,))]), multiple, len(filters))
    solution = widths.program.solve(settings.time_limit, settings.gap)
    return [] if solution.levels is None else sorted_units(units_at(choices, solution.levels), importance)


def _layers_with(unit: int, filters: Mapping[str, NDArray[np.int64]]) -> list[str]:
    return [layer for layer, units in filters.items() if (units == unit).any()]
