"""The units that may be removed, and the restriction of importance to some of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.layer_patterns import excluded_layers


def removable_units(graph: ChannelGraph, exclude: Sequence[str] = ()) -> NDArray[np.int64]:
    """Return the units that may be removed: prunable, and no filter of an excluded layer. Shape (number,), sorted.

    Raises:
        ValueError: no unit is left, or a pattern in ``exclude`` matches no layer.
    """
    if not len(graph.prunable):
        raise ValueError(f"nothing to prune: {_why_nothing_is_prunable(graph)}")
    excluded = [graph.layers[name] for name in sorted(excluded_layers(graph, exclude))]
    units = graph.prunable[~np.isin(graph.prunable, np.concatenate([*excluded, np.empty(0, np.int64)]))]
    if not len(units):
        raise ValueError(f"nothing to prune: exclude={list(exclude)} covers every layer; exclude fewer")
    return units


def restrict_to(importance: NDArray[np.float64], units: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the importance of ``units``, and infinity for all others, so that these stay.

    Example:
        >>> restrict_to(np.array([1.0, 2.0, 3.0]), np.array([1]))
        array([inf,  2., inf])
    """
    restricted = np.full_like(importance, np.inf)
    restricted[units] = importance[units]
    return restricted


def _why_nothing_is_prunable(graph: ChannelGraph) -> str:
    if not graph.layers:
        return "the traced forward uses no convolution or linear layer"
    return f"every filter must stay ({pin_reasons(graph)})"


def pin_reasons(graph: ChannelGraph) -> str:
    """Return up to three of the reasons why units are pinned, as text."""
    return "; ".join(list(dict.fromkeys(graph.pinned.values()))[:3])
