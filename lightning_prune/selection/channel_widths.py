"""The widths of layers during a selection, and the floors that they must not fall below."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Floor, Limits, channel_floors

__all__ = ["ChannelWidths"]


class ChannelWidths:
    """The number of channels of each layer, updated while units are removed and put back.

    Args:
        graph: of the current network.
        limits: with the floors.
        dense: the sizes before any cut, which decide how many channels a narrow layer keeps.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), torch.nn.Conv2d(6, 1, 3))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> widths = ChannelWidths(graph, Limits(), DenseSizes.of(graph))
        >>> widths.shift([("0", 1)], -5)
        >>> widths.reasons(widths.below_floor([("0", 1)]))
        {'0': 'at least 2 of its channels stay'}
    """

    def __init__(self, graph: ChannelGraph, limits: Limits, dense: DenseSizes) -> None:
        self._widths: Counter[str] = Counter()
        for weight, units in graph.layers.items():
            self._widths[module_of(weight)] += len(units)
        self._floors = channel_floors(graph, limits)
        self._minimum = {
            name: floor.of_dense(dense.channels.get(name, 0)) for name, floor in self._floors.items()
        }

    def shift(self, layers: Iterable[tuple[str, int]], number: int) -> None:
        """Add ``number`` units with the given channels in each layer; a negative number removes them."""
        for layer, channels in layers:
            self._widths[layer] += number * channels

    def below_floor(self, layers: Iterable[tuple[str, int]]) -> dict[str, Floor]:
        """Return those of the layers that have fewer channels than they must keep, with their floors."""
        return {
            layer: self._floors[layer]
            for layer, _ in layers
            if self._widths[layer] < self._minimum.get(layer, 0)
        }

    def floor(self, layer: str) -> int:
        """Return the number of channels that a layer must keep, or has already if these are fewer."""
        return min(self._minimum.get(layer, 0), self._widths[layer])

    def reasons(self, layers: Iterable[str]) -> dict[str, str]:
        """Return, for each layer, why it loses no more channels."""
        return {layer: f"at least {self._minimum[layer]} of its channels stay" for layer in layers}
