"""NEW."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.layer_patterns import excluded_layers


def candidates(graph: ChannelGraph, exclude: Sequence[str] = ()) -> NDArray[np.int64]:
    """The units that may go: prunable, and no filter of an excluded layer.

    Raises:
        ValueError: nothing is left, or a pattern in ``exclude`` matches no layer.
    """
    if not len(graph.prunable):
        raise ValueError(f"nothing to prune: {_why_pinned(graph)}")
    stay = [graph.layers[name] for name in sorted(excluded_layers(graph, exclude))]
    units = graph.prunable[~np.isin(graph.prunable, np.concatenate([*stay, np.empty(0, np.int64)]))]
    if not len(units):
        raise ValueError(f"nothing to prune: exclude={list(exclude)} covers every layer; exclude fewer")
    return units


def _why_pinned(graph: ChannelGraph) -> str:
    if not graph.layers:
        return "the traced forward uses no convolution or linear layer"
    return f"every filter must stay ({_reasons(graph)})"


def _reasons(graph: ChannelGraph) -> str:
    return "; ".join(list(dict.fromkeys(graph.pinned.values()))[:3])
