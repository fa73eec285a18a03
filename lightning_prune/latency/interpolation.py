"""Tables of values over channel counts, interpolated between the counts that were measured."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

__all__ = ["Lookup", "grid_counts"]

# Kernels work on blocks of 8 or 16 channels, so that time rises in steps: both sides of a step are measured.
SMALL_COUNTS = (1, 4, 8, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97)


def grid_counts(largest: int, step: int = 1, fine: bool = True, multiple: int = 1) -> tuple[int, ...]:
    """Return the channel counts up to ``largest`` at which to measure, denser where counts are small.

    Args:
        largest: the last count.
        step: all counts are multiples of it, ``largest`` excepted.
        fine: False: leave out the counts just above a step, about half of all.
        multiple: if above 1, counts that are multiples of it run differently from those that are not; the grid then
            holds counts of both kinds, and the next multiple takes the place of a count just above a step.

    Example:
        >>> grid_counts(40), grid_counts(12, step=4)
        ((1, 4, 8, 16, 17, 32, 33, 40), (4, 8, 12))
        >>> grid_counts(512)[-9:]
        (128, 129, 192, 193, 256, 257, 384, 385, 512)
        >>> grid_counts(40, multiple=4)
        (1, 4, 7, 8, 15, 16, 17, 20, 31, 32, 36, 39, 40)
    """
    counts, base = set(SMALL_COUNTS), 128
    while base < largest:
        counts |= {base, base + 1, base * 3 // 2, base * 3 // 2 + 1}
        base *= 2
    counts = counts if fine else {count for count in counts if count % 16 != 1}
    if multiple > 1:
        counts = {-(-count // multiple) * multiple for count in counts} | _non_multiples(largest, multiple)
    return tuple(sorted({max(step, count // step * step) for count in counts if count < largest} | {largest}))


def _non_multiples(largest: int, multiple: int) -> set[int]:
    """Return a few counts that are no multiples; time rises evenly between them."""
    counts = {1, 7, 15, 17, largest - 1, *(2**power - 1 for power in range(5, largest.bit_length()))}
    return {count for count in counts if count % multiple}


@dataclass(frozen=True)
class Lookup:
    """Values over the points of a grid, interpolated linearly along each axis, and constant beyond its ends.

    Args:
        axes: the counts along each axis, ascending; without an axis there is a single value.
        values: one per point, in the order of nested loops over the axes.
        multiples: one per axis: counts that are multiples of it are interpolated among themselves, and all other
            counts among themselves. Empty: all counts are interpolated together.

    Raises:
        ValueError: the numbers do not form such a table.

    Example:
        >>> Lookup(((1, 3), (2, 4)), (1.0, 2.0, 3.0, 4.0))(2, 3)
        2.5
        >>> Lookup(((1, 4, 7, 8),), (30.0, 10.0, 90.0, 20.0), (4,))(6)
        80.0
    """

    axes: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]
    multiples: tuple[int, ...] = ()
    _cache: dict[tuple[int, ...], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ascending = all(axis and all(a < b for a, b in pairwise(axis)) for axis in self.axes)
        numbers = [*self.multiples, *(count for axis in self.axes for count in axis)]
        positive_integers = all(type(count) is int and count > 0 for count in numbers)
        complete = len(self.values) == math.prod(map(len, self.axes))
        complete = complete and len(self.multiples) in (0, len(self.axes))
        finite = all(0 <= value < math.inf for value in self.values)
        if not (ascending and positive_integers and complete and finite):
            raise ValueError("not a table of values over ascending counts")

    def __call__(self, *counts: int) -> float:
        """Return the value at ``counts``."""
        if counts not in self._cache:
            self._cache[counts] = self._interpolate(0, 0, counts)
        return self._cache[counts]

    @cached_property
    def _positions(self) -> list[tuple[list[int], list[int]]]:
        """For each axis the positions of counts that are no multiples, and of those that are.

        Where one of the two is empty, it is the same as the other.
        """
        positions = []
        for axis, multiple in zip(self.axes, self.multiples or [1] * len(self.axes), strict=True):
            multiples = [position for position, count in enumerate(axis) if count % multiple == 0]
            others = [position for position, count in enumerate(axis) if count % multiple]
            positions.append((others or multiples, multiples or others))
        return positions

    def _interpolate(self, axis: int, row: int, counts: Sequence[int]) -> float:
        """Interpolate along ``axis`` and those after it; ``row`` is the position in the product of those before."""
        if axis == len(self.axes):
            return self.values[row]
        axis_counts, count = self.axes[axis], counts[axis]
        others, multiples = self._positions[axis]
        positions = multiples if not self.multiples or count % self.multiples[axis] == 0 else others
        right = min(bisect_right(positions, count, key=axis_counts.__getitem__), len(positions) - 1)
        low, high = positions[max(right - 1, 0)], positions[right]
        width = axis_counts[high] - axis_counts[low]
        share = (count - axis_counts[low]) / width if high > low else 0.0
        share, row = min(max(share, 0.0), 1.0), row * len(axis_counts)
        # A side of weight zero is not computed: with two axes that saves half of the work at measured counts.
        before = self._interpolate(axis + 1, row + low, counts) if share < 1 else 0.0
        after = self._interpolate(axis + 1, row + high, counts) if share > 0 else 0.0
        return (1 - share) * before + share * after
