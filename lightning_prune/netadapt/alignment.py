"""Widths rounded down to a multiple: which filters go beside those that the budget took (level 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.select import ranked
from lightning_prune.selection.unit_pool import UnitPool

__all__ = ["surplus"]


def surplus(
    graph: ChannelGraph,
    importance: NDArray[np.float64],
    layers: Sequence[str],
    multiple: int,
    limits: Limits,
    dense: DenseSizes,
) -> list[int]:
    """The least important units of coupled ``layers`` that must go so that each has a multiple of filters.

    Args:
        graph: of the network as it is.
        importance: one score per unit; infinite never goes. Shape (num_units,).
        layers: weights in ``graph.layers`` that share units.
        multiple: of filters.
        limits: how much may go of ``dense`` in all; what they forbid stays.
        dense: the sizes before any cut.

    Returns:
        Units; none if all widths are multiples, or if they cannot all become such.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 11, 3), torch.nn.Conv2d(11, 1, 3))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> surplus(graph, np.arange(12.0), ["0.weight"], 4, Limits(), DenseSizes.of(graph))
        [0, 1, 2]
    """
    own = {layer: graph.layers[layer] for layer in layers}
    left = {layer: len(units) for layer, units in own.items()}
    units = np.intersect1d(np.concatenate(list(own.values())), graph.prunable)
    units = ranked(units, importance)
    stock, gone = UnitPool(graph, limits, dense, multiple), list[int]()
    for unit in units.tolist():
        if any(left[layer] % multiple for layer in _holding(own, unit)):
            taken = stock.offer(unit)
            gone += taken
            for layer, held in own.items():
                left[layer] -= int(np.isin(held, taken).sum())
    touched = {layer for layer, held in own.items() if np.isin(held, units).any()}
    return gone if not any(left[layer] % multiple for layer in touched) else []


def _holding(own: Mapping[str, NDArray[np.int64]], unit: int) -> list[str]:
    return [layer for layer, held in own.items() if (held == unit).any()]
