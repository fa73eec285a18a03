"""Ids of channels, the ties between them, and their connected components.

Every index of every dimension of every parameter and buffer has an integer id. While a network is traced, ids that
can only be removed together are *tied*, as whole arrays; one call of connected components at the end turns ids into
units. There is no Python object per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["Ids", "Pin", "Tie", "Ties", "Units", "first_places"]

#: Ids, int64, of one dimension.
Ids = Tensor
#: Numbers of units, int64, of one dimension.
Units = NDArray[np.int64]


@dataclass(frozen=True)
class Tie:
    """Two id arrays of the same length that can only be removed together, position by position.

    ``where`` names the operator that ties them, for messages.
    """

    left: Ids
    right: Ids
    where: str


@dataclass(frozen=True)
class Pin:
    """Ids that must not be removed, with the reason and the operator that requires them."""

    ids: Ids
    reason: str
    where: str = ""


@dataclass
class _TieLabels:
    """Component labels of the first ids, by the first ``num_ties`` ties."""

    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    num_ties: int = 0


@dataclass
class Ties:
    """All ties and pins of a trace, in the order in which they were added.

    Attributes:
        count: number of ids.
        ties: pairs of id arrays.
        pins: ids that must stay.
        statistics: id arrays over which an operator takes statistics across channels.

    Example:
        >>> ties = Ties()
        >>> a, b = ties.fresh(3), ties.fresh(3)
        >>> ties.tie(a, b.flip(0))
        >>> ties.components().tolist()
        [0, 1, 2, 2, 1, 0]
    """

    count: int = 0
    ties: list[Tie] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    statistics: list[Ids] = field(default_factory=list)
    _cache: _TieLabels = field(default_factory=_TieLabels, repr=False)

    def fresh(self, size: int) -> Ids:
        """Return ``size`` new ids."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, left: Ids, right: Ids, where: str = "") -> None:
        """Tie two arrays position by position.

        Raises:
            ValueError: they differ in length.
        """
        if left.shape != right.shape:
            raise ValueError(f"cannot tie {len(left)} ids to {len(right)} in {where}")
        if left is not right and not torch.equal(left, right):
            self.ties.append(Tie(left, right, where))

    def pin(self, ids: Ids, reason: str, where: str = "") -> None:
        """Forbid the removal of ``ids``."""
        self.pins.append(Pin(ids, reason, where))

    def closure(self, ids: Ids) -> Callable[[Ids], Tensor]:
        """Return a function that maps ids to a mask: True if an id is in ``ids`` or tied so far to one of them."""
        labels = self._labels()
        closure_labels = labels[ids].unique()
        return lambda other_ids: torch.isin(labels[other_ids], closure_labels)

    def pinned_so_far(self) -> Callable[[Ids], Tensor]:
        """Return a function that maps ids to a mask: True if an id is pinned, or tied so far to a pinned one."""
        return self.closure(torch.cat([*(pin.ids for pin in self.pins), torch.empty(0, dtype=torch.int64)]))

    def _labels(self) -> Tensor:
        """Return the component of each id by the ties so far; only the ties since the last call are processed."""
        labels, num_ties = self._cache.labels, self._cache.num_ties
        if len(labels) == self.count and num_ties == len(self.ties):
            return labels
        labels = torch.cat([labels, torch.arange(len(labels), self.count)])
        new_ties = self.ties[num_ties:]
        left = _concatenate([labels[tie.left] for tie in new_ties])
        right = _concatenate([labels[tie.right] for tie in new_ties])
        if (left != right).any():  # otherwise the new ties are within the components
            labels = torch.from_numpy(_connect(left, right, self.count).astype(np.int64))[labels]
        self._cache = _TieLabels(labels, len(self.ties))
        return labels

    def components(self) -> Units:
        """Return the component of each id, shape (count,), numbered by first appearance."""
        left = _concatenate([tie.left for tie in self.ties])
        right = _concatenate([tie.right for tie in self.ties])
        labels = _connect(left, right, self.count)
        # SciPy does not promise an order of labels, and numbers of units must not depend on it.
        _, first = np.unique(labels, return_index=True)
        rank = np.argsort(np.argsort(first))
        return rank[labels].astype(np.int64)


def first_places(ids: Ids) -> Tensor:
    """Return the place at which each distinct id comes first, in order.

    Example:
        >>> first_places(torch.tensor([7, 3, 7, 3, 9])).tolist()
        [0, 1, 4]
    """
    distinct, inverse = ids.unique(return_inverse=True)
    places = torch.full((len(distinct),), len(ids)).scatter_reduce(0, inverse, torch.arange(len(ids)), "amin")
    return places.sort().values


def _concatenate(arrays: Sequence[Ids]) -> Units:
    return torch.cat([*arrays, torch.empty(0, dtype=torch.int64)]).numpy()


def _connect(left: Units, right: Units, count: int) -> NDArray[np.int32]:
    """Return the component label of each of ``count`` nodes in the graph with the edges (left[i], right[i])."""
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1]
