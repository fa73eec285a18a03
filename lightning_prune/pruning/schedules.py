"""Schedules: when to cut, and how much is removed by each cut.

A *schedule* maps the number of a cut, from 0, to the share of all that has to be removed which is removed after it: 0
is the dense network, 1 the budget. With a budget of 26 % of the MACs, 0.5 leaves 63 % of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Cubic", "Curve", "Linear", "OneShot", "Schedule", "Timing", "timing_of"]

#: number of the cut, from 0 -> share of all that has to be removed which is removed after it, in [0, 1]
Schedule = Callable[[int], float]
Unit = Literal["epochs", "steps"]


def _progress(cut: int, cuts: int) -> float:
    """Return how far ``cuts`` cuts have come after number ``cut``, in (0, 1]."""
    return min(1.0, (cut + 1) / cuts)


@dataclass(frozen=True)
class _CountedCuts:
    """Base class of schedules that end after ``cuts`` cuts."""

    cuts: int = 10

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise ValueError(f"a schedule needs at least 1 cut, got cuts={self.cuts}")


@dataclass(frozen=True)
class Linear(_CountedCuts):
    """Schedule that removes the same amount in each of ``cuts`` cuts.

    Raises:
        ValueError: ``cuts`` is below 1.

    Example:
        >>> [Linear(4)(cut) for cut in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __call__(self, cut: int) -> float:
        """Return the share that is removed after this cut."""
        return _progress(cut, self.cuts)


@dataclass(frozen=True)
class Cubic(_CountedCuts):
    """Schedule that removes much at first and little at the end: ``1 - (1 - t)^3`` (Zhu & Gupta, 2017).

    The paper counts the start, where nothing is removed, as the first step; here each of the ``cuts`` removes some.

    Raises:
        ValueError: ``cuts`` is below 1.

    Example:
        >>> [round(Cubic(4)(cut), 3) for cut in range(4)]
        [0.578, 0.875, 0.984, 1.0]
    """

    def __call__(self, cut: int) -> float:
        """Return the share that is removed after this cut."""
        return 1 - (1 - _progress(cut, self.cuts)) ** 3


@dataclass(frozen=True)
class OneShot:
    """Schedule that removes everything in the first cut.

    Example:
        >>> OneShot()(0)
        1.0
    """

    def __call__(self, cut: int) -> float:
        """Return the share that is removed after this cut."""
        return 1.0


@dataclass(frozen=True)
class Curve:
    """Schedule by a function of one's own, from the progress in (0, 1] to the removed share, over ``cuts`` cuts.

    Args:
        function: progress -> share of the planned removal that is done by then, both in (0, 1].
        cuts: number of cuts.

    Raises:
        ValueError: ``cuts`` is below 1.

    Example:
        >>> [Curve(lambda progress: progress**2, cuts=2)(cut) for cut in range(3)]
        [0.25, 1.0, 1.0]
    """

    function: Callable[[float], float]
    cuts: int = 10

    def __post_init__(self) -> None:
        _CountedCuts(self.cuts)

    def __call__(self, cut: int) -> float:
        """Return the share that is removed after this cut."""
        return self.function(_progress(cut, self.cuts))


@dataclass(frozen=True)
class Timing:
    """The epochs or optimizer steps at which cuts are due, and how much each removes.

    Attributes:
        every: epochs or optimizer steps from one cut to the next.
        start: the first cut comes at the end of this epoch (from 0), or after this many steps.
        unit: epochs or optimizer steps.
        schedule: how much each cut removes; None: a fixed amount.

    Example:
        >>> timing = Timing(every=2, start=1, schedule=Linear(2))
        >>> [epoch for epoch in range(6) if timing.due(epoch - 1, epoch)]
        [1, 3, 5]
        >>> timing.share(1), timing.share(3)
        (0.5, 1.0)
    """

    every: int = 1
    start: int = 1
    unit: Unit = "epochs"
    schedule: Schedule | None = None

    @property
    def by_steps(self) -> bool:
        """Whether optimizer steps are counted, so that cuts come within epochs."""
        return self.unit == "steps"

    def number(self, now: int) -> int:
        """Return the number of the last cut that is due by ``now``, from 0; -1 before the first."""
        return (now - self.start) // self.every if now >= self.start else -1

    def due(self, before: int, now: int) -> bool:
        """Return whether a cut falls into ``(before, now]``; several optimizers may step in one batch."""
        return self.number(now) > self.number(before)

    def is_observed(self, now: int) -> bool:
        """Return whether a cut ends the present epoch, or interval of steps, so that it has to be observed."""
        return self.due(now, now + self.every) if self.by_steps else self.due(now - 1, now)

    def share(self, now: int) -> float | None:
        """Return the share that is removed after the cut at ``now``; None without a schedule.

        Raises:
            ValueError: the schedule returns no number in [0, 1].
        """
        return None if self.schedule is None else scheduled_share(self.schedule, self.number(now))


def scheduled_share(schedule: Schedule, cut: int) -> float:
    """Return the share that ``schedule`` gives for a cut.

    Raises:
        ValueError: it is no number in [0, 1].
    """
    answer: Any = schedule(cut)
    try:
        share = float(answer)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(
            f"schedule({cut}) must be the share that is removed after cut {cut}, a number in [0, 1], got {answer!r}"
        )
    return share


def timing_of(
    every_n_epochs: int,
    start_epoch: int,
    every_n_steps: int | None,
    start_step: int | None,
    schedule: Schedule | None,
) -> Timing:
    """Return the timing that a callback's arguments mean.

    Raises:
        ValueError: a number is out of range, epochs and steps are mixed, or the schedule is not callable.
    """
    if every_n_epochs < 1 or start_epoch < 0:
        raise ValueError(
            f"need every_n_epochs >= 1 and start_epoch >= 0, got {every_n_epochs} and {start_epoch}"
        )
    if schedule is not None:
        if not callable(schedule):
            raise ValueError(f"schedule must be callable with the number of a cut, got {schedule!r}")
        scheduled_share(schedule, 0)
    if every_n_steps is None:
        if start_step is not None:
            raise ValueError("start_step needs every_n_steps; to count epochs, use start_epoch")
        return Timing(every_n_epochs, start_epoch, "epochs", schedule)
    if every_n_epochs != 1:
        raise ValueError("cuts come every_n_epochs or every_n_steps, not both: leave one of them out")
    start_step = every_n_steps if start_step is None else start_step
    if every_n_steps < 1 or start_step < 1:
        raise ValueError(f"need every_n_steps >= 1 and start_step >= 1, got {every_n_steps} and {start_step}")
    return Timing(every_n_steps, start_step, "steps", schedule)
