"""Intervals of means by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

__all__ = ["Interval", "interval"]


@dataclass(frozen=True)
class Interval:
    """Mean of differences and its 95 % interval by Student's t; infinite with fewer than two values."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def verdict(self) -> str:
        """Return ``"above"`` or ``"below"`` if the interval excludes 0, else ``"open"``."""
        return "above" if self.low > 0 else "below" if self.high < 0 else "open"

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:+.3f} (one seed)" if self.count else ""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return mean and interval of values.

    Example:
        >>> str(interval([0.1, 0.2, 0.3]))
        '+0.200 [-0.048, +0.448]'
    """
    if not values:
        return Interval(math.nan, -math.inf, math.inf, 0)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))
