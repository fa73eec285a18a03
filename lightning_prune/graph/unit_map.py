"""The units of a network, and those of the same network after residual blocks have vanished."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.ids import Units

__all__ = ["UnitMap"]


@dataclass(frozen=True)
class UnitMap:
    """Pairs of units that have a filter or another index of a tensor in common.

    Attributes:
        before: units of the network as it was, shape (pairs,).
        after: units of what is left, shape (pairs,).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> graph = trace(net, torch.zeros(1, 2))
        >>> UnitMap.of(graph, graph).forward(np.array([0, 2]))
        array([0, 2])
    """

    before: Units
    after: Units

    @classmethod
    def of(cls, before: ChannelGraph, after: ChannelGraph) -> UnitMap:
        """Return the map between two graphs, by the tensors that both have."""
        pairs = [
            np.stack([before.bindings[name][dim], units])
            for name, dims in after.bindings.items()
            for dim, units in dims.items()
            if len(before.bindings.get(name, {}).get(dim, ())) == len(units)
        ]
        found = np.unique(np.concatenate([*pairs, np.empty((2, 0), np.int64)], axis=1), axis=1)
        return cls(found[0], found[1])

    def forward(self, units: Units) -> Units:
        """Return the units of what is left that are parts of ``units``; those that have vanished are left out."""
        return np.unique(self.after[np.isin(self.before, units)])

    def backward(self, units: Units) -> Units:
        """Return the units of the network as it was, to which ``units`` of what is left belong."""
        return np.unique(self.before[np.isin(self.after, units)])
