"""Measured values on a grid of channel counts, and what lies between (level 3)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

__all__ = ["Lookup", "levels"]

# Kernels work on blocks of 8 or 16 channels, so that time rises in steps: both sides of a step are measured.
NEAR = (1, 4, 8, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97)


def levels(most: int, step: int = 1, fine: bool = True, multiple: int = 1) -> tuple[int, ...]:
    """The counts up to ``most`` at which to measure, multiples of ``step``: close together where they are few.

    Where not ``fine``, about half as many: the far sides of steps are left out. Where a ``multiple`` makes a
    difference, the far side of a step is the next one, and some counts that are none are there, too.

    Example:
        >>> levels(40), levels(12, step=4)
        ((1, 4, 8, 16, 17, 32, 33, 40), (4, 8, 12))
        >>> levels(512)[-9:]
        (128, 129, 192, 193, 256, 257, 384, 385, 512)
        >>> levels(40, multiple=4)
        (1, 4, 7, 8, 15, 16, 17, 20, 31, 32, 36, 39, 40)
    """
    found, each = set(NEAR), 128
    while each < most:
        found |= {each, each + 1, each * 3 // 2, each * 3 // 2 + 1}
        each *= 2
    found = found if fine else {count for count in found if count % 16 != 1}
    if multiple > 1:
        found = {-(-count // multiple) * multiple for count in found} | _between(most, multiple)
    return tuple(sorted({max(step, count // step * step) for count in found if count < most} | {most}))


def _between(most: int, multiple: int) -> set[int]:
    """Counts that are no multiples: there time rises evenly, so that few will do."""
    found = {1, 7, 15, 17, *(2**power - 1 for power in range(5, most.bit_length()))}
    return {count for count in found | {most - 1} if count % multiple}


@dataclass(frozen=True)
class Lookup:
    """Values over one or two axes, interpolated linearly along each; beyond the ends they stay.

    Args:
        axes: the counts that were measured along each axis, ascending; no axis: a single value.
        values: in the order of nested loops over the axes.
        multiples: of each axis; counts that are multiples of it are interpolated among themselves, and so are the
            others. None given: all alike.

    Raises:
        ValueError: the numbers are not such a table.

    Example:
        >>> Lookup(((1, 3), (2, 4)), (1.0, 2.0, 3.0, 4.0))(2, 3)
        2.5
        >>> Lookup(((1, 4, 7, 8),), (30.0, 10.0, 90.0, 20.0), (4,))(6)
        80.0
    """

    axes: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]
    multiples: tuple[int, ...] = ()
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rising = all(axis and all(a < b for a, b in pairwise(axis)) for axis in self.axes)
        numbers = [*self.multiples, *(count for axis in self.axes for count in axis)]
        whole = all(type(count) is int and count > 0 for count in numbers)
        fits = len(self.values) == math.prod(map(len, self.axes))
        fits = fits and len(self.multiples) in (0, len(self.axes))
        if not (rising and whole and fits and all(0 <= value < math.inf for value in self.values)):
            raise ValueError("not a table of values over ascending counts")

    def __call__(self, *counts: int) -> float:
        """The value at ``counts``."""
        if counts not in self._known:
            self._known[counts] = self._along(0, 0, counts)
        return self._known[counts]

    @cached_property
    def _alike(self) -> list[tuple[list[int], list[int]]]:
        """Places along each axis whose counts are no multiples, and whose are; all of them, where there are none."""
        found = []
        for axis, multiple in zip(self.axes, self.multiples or [1] * len(self.axes), strict=True):
            whole = [place for place, count in enumerate(axis) if count % multiple == 0]
            others = [place for place, count in enumerate(axis) if count % multiple]
            found.append((others or whole, whole or others))
        return found

    def _along(self, axis: int, row: int, counts: Sequence[int]) -> float:
        """Interpolate along ``axis`` and those after it, in a row of the axes before it."""
        if axis == len(self.axes):
            return self.values[row]
        known, count = self.axes[axis], counts[axis]
        places = self._alike[axis][not self.multiples or count % self.multiples[axis] == 0]
        right = min(bisect_right(places, count, key=known.__getitem__), len(places) - 1)
        low, high = places[max(right - 1, 0)], places[right]
        share = (count - known[low]) / (known[high] - known[low]) if high > low else 0.0
        share, row = min(max(share, 0.0), 1.0), row * len(known)
        before = self._along(axis + 1, row + low, counts) if share < 1 else 0.0
        after = self._along(axis + 1, row + high, counts) if share > 0 else 0.0
        return (1 - share) * before + share * after
