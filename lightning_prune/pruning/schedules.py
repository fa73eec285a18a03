"""When to cut, and how much is to be gone after each cut (level 0).

A *schedule* maps the number of a cut, from 0 on, to the share of what has to go that is gone after it: 0 is the
dense network, 1 the budget. With a budget of 26 % of the MACs, 0.5 leaves 63 % of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Cubic", "Curve", "Linear", "OneShot", "Schedule", "Timing", "timing_of"]

#: number of the cut, from 0 on -> share of what has to go that is gone after it, in [0, 1]
Schedule = Callable[[int], float]
Unit = Literal["epochs", "steps"]


def _progress(cut: int, cuts: int) -> float:
    return min(1.0, (cut + 1) / cuts)


@dataclass(frozen=True)
class _Several:
    cuts: int = 10

    def __post_init__(self) -> None:
        if self.cuts < 1:
            raise ValueError(f"a schedule needs at least 1 cut, got cuts={self.cuts}")


@dataclass(frozen=True)
class Linear(_Several):
    """The same amount in each of ``cuts`` cuts.

    Raises:
        ValueError: ``cuts`` is below 1.

    Example:
        >>> [Linear(4)(cut) for cut in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __call__(self, cut: int) -> float:
        """The share that is gone after this cut."""
        return _progress(cut, self.cuts)


@dataclass(frozen=True)
class Cubic(_Several):
    """Much at first, while there is much to spare, and little at last: ``1 - (1 - t)^3`` (Zhu & Gupta, 2017).

    Theirs counts the start, at which nothing goes, as the first step; here each of the ``cuts`` removes something.

    Raises:
        ValueError: ``cuts`` is below 1.

    Example:
        >>> [round(Cubic(4)(cut), 3) for cut in range(4)]
        [0.578, 0.875, 0.984, 1.0]
    """

    def __call__(self, cut: int) -> float:
        """The share that is gone after this cut."""
        return 1 - (1 - _progress(cut, self.cuts)) ** 3


@dataclass(frozen=True)
class OneShot:
    """All at once.

    Example:
        >>> OneShot()(0)
        1.0
    """

    def __call__(self, cut: int) -> float:
        """The share that is gone after this cut."""
        return 1.0


@dataclass(frozen=True)
class Curve:
    """Your own curve: ``function`` maps the progress in (0, 1] to the share that is gone, over ``cuts`` cuts.

    Raises:
        ValueError: ``cuts`` is below 1.

    Example:
        >>> [Curve(lambda progress: progress**2, cuts=2)(cut) for cut in range(3)]
        [0.25, 1.0, 1.0]
    """

    function: Callable[[float], float]
    cuts: int = 10

    def __post_init__(self) -> None:
        _Several(self.cuts)

    def __call__(self, cut: int) -> float:
        """The share that is gone after this cut."""
        return self.function(_progress(cut, self.cuts))


@dataclass(frozen=True)
class Timing:
    """At which epochs or optimizer steps cuts are due, and how far each goes.

    Attributes:
        every: epochs or optimizer steps from one cut to the next.
        start: the first cut comes at the end of this epoch (from 0), or after this many steps.
        unit: what is counted.
        schedule: how far each cut goes; None: by a fixed amount.

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
        """Whether cuts come within epochs."""
        return self.unit == "steps"

    def number(self, now: int) -> int:
        """Of the last cut that is due by ``now``, from 0; -1 before the first."""
        return (now - self.start) // self.every if now >= self.start else -1

    def due(self, before: int, now: int) -> bool:
        """Whether a cut falls into ``(before, now]``. One optimizer after another may step in a single batch."""
        return self.number(now) > self.number(before)

    def gathering(self, now: int) -> bool:
        """Whether what happens now is looked at: the epoch, or the interval of steps, that a cut ends."""
        return self.due(now, now + self.every) if self.by_steps else self.due(now - 1, now)

    def share(self, now: int) -> float | None:
        """How much of what has to go is gone after the cut at ``now``; None: a fixed amount goes.

        Raises:
            ValueError: the schedule's answer is not in [0, 1].
        """
        return None if self.schedule is None else checked(self.schedule, self.number(now))


def checked(schedule: Schedule, cut: int) -> float:
    """The share that ``schedule`` gives for a cut.

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
            f"schedule({cut}) must be the share of what has to go that is gone after cut {cut}, a number in "
            f"[0, 1], got {answer!r}"
        )
    return share


def timing_of(
    every_n_epochs: int,
    start_epoch: int,
    every_n_steps: int | None,
    start_step: int | None,
    schedule: Schedule | None,
) -> Timing:
    """The timing that a callback's arguments mean.

    Raises:
        ValueError: a number is out of range, epochs and steps are mixed, or the schedule is none.
    """
    if every_n_epochs < 1 or start_epoch < 0:
        raise ValueError(
            f"need every_n_epochs >= 1 and start_epoch >= 0, got {every_n_epochs} and {start_epoch}"
        )
    if schedule is not None:
        if not callable(schedule):
            raise ValueError(f"schedule must be callable with the number of a cut, got {schedule!r}")
        checked(schedule, 0)
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
