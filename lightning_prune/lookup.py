"""Measured values on a grid of channel counts, and what lies between (level 3)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = ["Lookup", "levels"]

# Kernels work on blocks of 8 or 16 channels, so that time rises in steps: both sides of a step are measured.
NEAR = (1, 4, 8, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97)


def levels(most: int, step: int = 1, fine: bool = True) -> tuple[int, ...]:
    """The counts up to ``most`` at which to measure, multiples of ``step``: close together where they are few.

    Where not ``fine``, about half as many: the far sides of steps are left out.

    Example:
        >>> levels(40), levels(12, step=4)
        ((1, 4, 8, 16, 17, 32, 33, 40), (4, 8, 12))
        >>> levels(512)[-9:]
        (128, 129, 192, 193, 256, 257, 384, 385, 512)
    """
    found, each = set(NEAR), 128
    while each < most:
        found |= {each, each + 1, each * 3 // 2, each * 3 // 2 + 1}
        each *= 2
    found = found if fine else {count for count in found if count % 16 != 1}
    return tuple(sorted({max(step, count // step * step) for count in found if count < most} | {most}))


@dataclass(frozen=True)
class Lookup:
    """Values over one or two axes, interpolated linearly along each; beyond the ends they stay.

    Args:
        axes: the counts that were measured along each axis, ascending; no axis: a single value.
        values: in the order of nested loops over the axes.

    Raises:
        ValueError: the numbers are not such a table.

    Example:
        >>> Lookup(((1, 3), (2, 4)), (1.0, 2.0, 3.0, 4.0))(2, 3)
        2.5
    """

    axes: tuple[tuple[int, ...], ...]
    values: tuple[float, ...]
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rising = all(axis and all(a < b for a, b in pairwise(axis)) for axis in self.axes)
        whole = all(type(count) is int for axis in self.axes for count in axis)
        fits = len(self.values) == math.prod(map(len, self.axes))
        if not (rising and whole and fits and all(0 <= value < math.inf for value in self.values)):
            raise ValueError("not a table of values over ascending counts")

    def __call__(self, *counts: int) -> float:
        """The value at ``counts``."""
        if counts not in self._known:
            self._known[counts] = self._along(0, 0, counts)
        return self._known[counts]

    def _along(self, axis: int, row: int, counts: Sequence[int]) -> float:
        """Interpolate along ``axis`` and those after it, in a row of the axes before it."""
        if axis == len(self.axes):
            return self.values[row]
        known, count = self.axes[axis], counts[axis]
        right = min(bisect_right(known, count), len(known) - 1)
        left = max(right - 1, 0)
        share = (count - known[left]) / (known[right] - known[left]) if right > left else 0.0
        share, row = min(max(share, 0.0), 1.0), row * len(known)
        low = self._along(axis + 1, row + left, counts) if share < 1 else 0.0
        high = self._along(axis + 1, row + right, counts) if share > 0 else 0.0
        return (1 - share) * low + share * high
