"""How long a training still takes, estimated from its epochs so far."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import lightning as L

__all__ = ["RunClock", "number_of_epochs"]

RECENT = 3  # epochs whose mean counts: they get faster while the network shrinks


class RunClock:
    """Clock of a training.

    Args:
        now: returns seconds.

    Example:
        >>> times = iter([0, 10, 19])
        >>> clock = RunClock(lambda: next(times))
        >>> clock.start_epoch()
        >>> clock.start_epoch()  # the first took 10 s
        >>> clock.seconds_left(share=0.25, epochs=2)  # of the second; then two more
        27.5
        >>> clock.elapsed
        19
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begin: float | None = None
        self._start = 0.0
        self._durations: deque[float] = deque(maxlen=RECENT)

    def start_epoch(self) -> None:
        """Note that an epoch begins, and the one before has ended, with its validation and its cut."""
        now = self._now()
        if self._begin is None:
            self._begin = now
        else:
            self._durations.append(now - self._start)
        self._start = now

    @property
    def elapsed(self) -> float:
        """Seconds since the first epoch began; 0 before."""
        return 0.0 if self._begin is None else self._now() - self._begin

    def seconds_left(self, share: float, epochs: int) -> float | None:
        """Return an estimate of the time until the end; None as long as there is nothing to estimate it from.

        Args:
            share: of the present epoch that is done, from 0 to 1.
            epochs: number of epochs after the present one.
        """
        if self._durations:
            per_epoch = sum(self._durations) / len(self._durations)
        elif share > 0:
            per_epoch = (self._now() - self._start) / share
        else:
            return None
        return per_epoch * (1 - share + epochs)


def number_of_epochs(trainer: L.Trainer) -> int | None:
    """Return how many epochs a training has at most; None if only time or callbacks end it."""
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs)
    steps = trainer.num_training_batches / max(trainer.accumulate_grad_batches, 1)
    if trainer.max_steps > 0 and 0 < steps < math.inf:
        limits.append(math.ceil(trainer.max_steps / math.ceil(steps)))
    return min(limits, default=None)
