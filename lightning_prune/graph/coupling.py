"""Which layers lose channels together, and which layers read whose channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from lightning_prune.tracing.ids import Units
from lightning_prune.utils.formatting import counted

__all__ = ["CoupledLayers", "coupled_layers", "readers"]


@dataclass(frozen=True)
class CoupledLayers:
    """Layers that share units, so that a channel of one is removed from the others too.

    Attributes:
        layers: qualified names of their weights; a layer alone is coupled to none.
        units: number of their units.
        block: number of channels of a layer that are one unit, as in front of a group norm; 0 if layers differ in it.
    """

    layers: tuple[str, ...]
    units: int
    block: int = 1

    def __str__(self) -> str:
        """Return what is shared, for people: ``16 channels, 4 at a time``."""
        if self.block == 0:
            return counted(self.units, "block") + " of channels"
        channels = counted(self.units * self.block, "channel")
        return channels if self.block == 1 else f"{channels}, {self.block} at a time,"


def coupled_layers(layers: Mapping[str, Units]) -> list[CoupledLayers]:
    """Group layers that share units, directly or through others, in the order of their first layers.

    Args:
        layers: name -> unit of each filter.

    Example:
        >>> coupled_layers({"a": np.array([0, 1]), "b": np.array([2]), "c": np.array([1, 0])})
        [CoupledLayers(layers=('a', 'c'), units=2, block=1), CoupledLayers(layers=('b',), units=1, block=1)]
        >>> print(*coupled_layers({"a": np.array([0, 0, 1, 1]), "b": np.array([1, 1, 0, 0])}))
        4 channels, 2 at a time,
    """
    names = list(layers)
    units = [np.unique(array) for array in layers.values()]
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(_components(units)):
        groups.setdefault(label, []).append(row)
    return [
        CoupledLayers(
            tuple(names[row] for row in rows),
            len(np.unique(np.concatenate([units[row] for row in rows]))),
            _block([layers[names[row]] for row in rows]),
        )
        for rows in groups.values()
    ]


def _block(layers: Sequence[Units]) -> int:
    """Return how many filters each unit is, in all layers; 0 if units differ."""
    sizes = {int(size) for array in layers for size in np.unique(array, return_counts=True)[1]}
    return sizes.pop() if len(sizes) == 1 else 0


def _components(units: Sequence[Units]) -> list[int]:
    """Return the number of the component of each array, equal for arrays that share units."""
    if not units:
        return []
    size = max((int(array.max(initial=-1)) for array in units), default=-1) + 1
    rows = np.repeat(np.arange(len(units)), [len(array) for array in units])
    incidence = csr_matrix((np.ones(len(rows)), (rows, np.concatenate(units))), shape=(len(units), size))
    labels: list[int] = connected_components(incidence @ incidence.T, directed=False)[1].tolist()
    return labels


def readers(
    layers: Mapping[str, Units], filter_dims: Mapping[str, int], bindings: Mapping[str, Mapping[int, Units]]
) -> dict[str, list[str]]:
    """Return for each layer the layers whose input channels are its filters.

    Args:
        layers: name -> unit of each filter.
        filter_dims: name -> dimension of its filters.
        bindings: parameter -> dimension -> unit of each index.

    Example:
        >>> a, b = np.array([0, 1]), np.array([2])
        >>> readers({"a": a, "b": b}, {"a": 0, "b": 0}, {"a": {0: a}, "b": {0: b, 1: a}})
        {'a': ['b'], 'b': []}
    """
    writers: dict[int, list[str]] = {}
    for name, units in layers.items():
        for unit in np.unique(units).tolist():
            writers.setdefault(unit, []).append(name)
    found: dict[str, dict[str, None]] = {name: {} for name in layers}
    for reader in layers:
        for dim, units in bindings.get(reader, {}).items():
            if dim != filter_dims[reader]:
                for unit in np.unique(units).tolist():
                    for writer in writers.get(unit, ()):
                        found[writer][reader] = None
    return {name: list(names) for name, names in found.items()}
