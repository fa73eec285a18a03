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
from torch import Tensor

__all__ = ["Ids", "Pin", "Tie", "Ties", "Units", "first_places"]

#: Ids, int64, of one dimension.
Ids = Tensor
#: Numbers of units, int64, of one dimension.
Units = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Tie:
    """Two id arrays of the same length that can only be removed together, position by position.

    ``where`` names the operator that ties them, for messages.
    """

    left: Ids
    right: Ids
    where: str


@dataclass(slots=True, eq=False)
class Pin:
    """Ids that must not be removed, with the reason and the operator that requires them."""

    ids: Ids
    reason: str
    where: str = ""


@dataclass
class _Forest:
    """The components of ids by the first ties: each id points to a smaller one of its own, the smallest to itself.

    Attributes:
        parents: the id that each id points to; there is room for more ids than there are.
        num_ties: the number of ties that are processed.
        num_pins: the number of pins that are processed.
        pinned: one id of each component with a pin, of the pins that are processed.
    """

    parents: Units = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_ties: int = 0
    num_pins: int = 0
    pinned: Units = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def smallest(self, ids: Units) -> Units:
        """Return the smallest id of the component of each id."""
        found = self.parents[ids]
        while not np.array_equal(found, above := self.parents[found]):
            found = above
        return found

    def add(self, left: Units, right: Units) -> None:
        """Join the component of ``left[i]`` with that of ``right[i]``, for each ``i``."""
        while True:
            left, right = self.smallest(left), self.smallest(right)
            left, right = left[left != right], right[left != right]
            if not len(left):
                return
            # Each root points to the lowest of those that it is tied to; ties that this loses come again.
            higher = np.maximum(left, right)
            np.minimum.at(self.parents, higher, np.minimum(left, right))
            self._shorten(higher)

    def _shorten(self, ids: Units) -> None:
        """Let ids point to the smallest of their components; each step halves the way there."""
        while not np.array_equal(parents := self.parents[ids], above := self.parents[parents]):
            self.parents[ids] = above

    def grow(self, count: int) -> None:
        """Make room for ``count`` ids; new ones are components of their own."""
        if count > len(self.parents):
            self.parents = np.append(
                self.parents, np.arange(len(self.parents), max(count, 2 * len(self.parents)))
            )


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
    _forest: _Forest = field(default_factory=_Forest, repr=False)

    def fresh(self, size: int) -> Ids:
        """Return ``size`` new ids."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def fresh_arrays(self, sizes: Sequence[int]) -> list[Ids]:
        """Return new ids for each of several sizes, as consecutive calls of :meth:`fresh` do."""
        start, self.count = self.count, self.count + sum(sizes)
        return list(torch.arange(start, self.count).split(list(sizes)))

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
        return self._closure(ids.numpy())

    def pinned_so_far(self) -> Callable[[Ids], Tensor]:
        """Return a function that maps ids to a mask: True if an id is pinned, or tied so far to a pinned one."""
        forest = self._components_so_far()
        new = [pin.ids.numpy() for pin in self.pins[forest.num_pins :]]
        forest.pinned = np.unique(forest.smallest(np.concatenate([forest.pinned, *new])))
        forest.num_pins = len(self.pins)
        return self._closure(forest.pinned)

    def _closure(self, ids: Units) -> Callable[[Ids], Tensor]:
        forest = self._components_so_far()
        return lambda other: torch.from_numpy(np.isin(forest.smallest(other.numpy()), forest.smallest(ids)))

    def _components_so_far(self) -> _Forest:
        """Return the components by all ties; only those since the last call are processed."""
        forest, new = self._forest, self.ties[self._forest.num_ties :]
        forest.grow(self.count)
        if new:
            forest.add(_concatenate([tie.left for tie in new]), _concatenate([tie.right for tie in new]))
            forest.num_ties = len(self.ties)
        return forest

    def components(self) -> Units:
        """Return the component of each id, shape (count,), numbered by first appearance."""
        smallest = self._components_so_far().smallest(np.arange(self.count))
        numbers: Units = np.cumsum(smallest == np.arange(self.count)) - 1
        return numbers[smallest]


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
