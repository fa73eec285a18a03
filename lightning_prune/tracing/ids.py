"""Ids of channels, and what ties them together (level 0).

Every index of every dimension of every parameter and buffer has an integer id. While a network is traced,
ids that must live or die together are *tied*, as whole arrays; one connected-components call at the end turns
ids into units. There is no Python object per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["Ids", "Pin", "Tie", "Ties"]


Units = NDArray[np.int64]


Ids = Tensor  # int64, one dimension


@dataclass(frozen=True)
class Tie:
    """Two id arrays of the same length that live or die together, position by position, and who said so."""

    left: Ids
    right: Ids
    where: str


@dataclass(frozen=True)
class Pin:
    """Ids that must stay, and why."""

    ids: Ids
    reason: str
    where: str = ""


@dataclass
class Ties:
    """All ties and pins of a trace, in the order in which they were met.

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
    _known: tuple[Tensor, int] = field(
        default_factory=lambda: (torch.empty(0, dtype=torch.int64), 0), repr=False
    )

    def fresh(self, size: int) -> Ids:
        """``size`` ids never used before."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, left: Ids, right: Ids, where: str = "") -> None:
        """Tie two arrays position by position; they must have the same length."""
        if left.shape != right.shape:
            raise ValueError(f"cannot tie {len(left)} ids to {len(right)} in {where}")
        if left is not right and not torch.equal(left, right):
            self.ties.append(Tie(left, right, where))

    def pin(self, ids: Ids, reason: str, where: str = "") -> None:
        """Forbid the removal of ``ids``."""
        self.pins.append(Pin(ids, reason, where))

    def closure(self, ids: Ids) -> Callable[[Ids], Tensor]:
        """A function that says of each id whether it is tied so far to any of ``ids``, themselves included."""
        labels = self._labels()
        gone = labels[ids].unique()
        return lambda asked: torch.isin(labels[asked], gone)

    def _labels(self) -> Tensor:
        """Component of each id by the ties so far, brought up to date by the new ones alone."""
        known, done = self._known
        if len(known) == self.count and done == len(self.ties):
            return known
        known = torch.cat([known, torch.arange(len(known), self.count)])
        edges = [(known[tie.left], known[tie.right]) for tie in self.ties[done:]]
        left, right = (
            torch.cat([*side, known[:0]]).numpy() for side in ([a for a, _ in edges], [b for _, b in edges])
        )
        if (left != right).any():  # else the ties say what is known
            matrix = coo_matrix(
                (np.ones(len(left), dtype=np.int8), (left, right)), shape=(self.count, self.count)
            )
            known = torch.from_numpy(connected_components(matrix, directed=False)[1].astype(np.int64))[known]
        self._known = known, len(self.ties)
        return known

    def components(self) -> NDArray[np.int64]:
        """Component of each id, shape (count,), numbered by first appearance."""
        left, right = self._edges()
        edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self.count, self.count))
        labels = connected_components(edges, directed=False)[1]
        _, first = np.unique(labels, return_index=True)
        order = np.argsort(np.argsort(first))
        return order[labels].astype(np.int64)

    def _edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        empty = [torch.empty(0, dtype=torch.int64)]
        left = torch.cat([tie.left for tie in self.ties] or empty)
        right = torch.cat([tie.right for tie in self.ties] or empty)
        return left.numpy(), right.numpy()

    def reasons(self) -> Iterator[tuple[int, str]]:
        """Every pinned id with its reason, in order."""
        for pin in self.pins:
            text = f"{pin.reason} ({pin.where})" if pin.where else pin.reason
            for index in pin.ids.tolist():
                yield index, text
