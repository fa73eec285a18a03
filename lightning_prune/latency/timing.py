"""How long something takes, on a machine that does other things too (level 3)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

__all__ = ["TimedCall", "beside", "clock", "elapsed", "quick", "rounds", "timed"]

#: does once what is to be timed
TimedCall = Callable[[], object]
IN_A_ROW = 3  # timed calls in one turn
QUICK = 0.1
ON_GPU = 20  # calls between two waits, so that the launches of one overlap with the work of the other


def clock(device: torch.device, threads: int) -> Callable[[], int]:
    """A clock in nanoseconds: of the thread where one thread does all the work, so that others do not count.

    Example:
        >>> clock(torch.device("cpu"), 1).__name__, clock(torch.device("cpu"), 2).__name__
        ('thread_time_ns', 'perf_counter_ns')
    """
    return time.thread_time_ns if device.type == "cpu" and threads == 1 else time.perf_counter_ns


def elapsed(run: TimedCall, device: torch.device, now: Callable[[], int]) -> float:
    """Nanoseconds of one call; on a GPU, of one of many that are queued."""
    times = ON_GPU if device.type == "cuda" else 1
    _wait(device)
    start = now()
    for _ in range(times):
        run()
    _wait(device)
    return (now() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds(number: int, times: int) -> Iterator[int]:
    """The indices 0 to ``number``, so many ``times``, every other time backwards.

    Example:
        >>> list(rounds(3, 2))
        [0, 1, 2, 2, 1, 0]
    """
    for turn in range(times):
        yield from reversed(range(number)) if turn % 2 else range(number)


def quick(times: Sequence[float]) -> float:
    """What a call takes when nothing disturbs it: the tenth percentile.

    Others on the machine take its caches away, now and then, which processor time shows too: a median would count
    that, and the ratio of two networks' medians scatters the more.

    Example:
        >>> quick([float(n) for n in range(11)])
        1.0
    """
    return float(np.quantile(times, QUICK))


def beside(
    first: TimedCall, others: Sequence[TimedCall], device: torch.device, threads: int, times: int = 15
) -> list[float]:
    """As :func:`timed`, where all others are held against the first: it has more turns, spread among theirs.

    An error in its time would be one in every ratio.

    Example:
        >>> len(beside(lambda: None, [lambda: 1], torch.device("cpu"), 1, times=3))
        2
    """
    middle = len(others) // 2
    runs = [first, *others[:middle], first, *others[middle:], first]
    found = timed(runs, device, threads, times)
    own = statistics.median(found.pop(place) for place in (len(runs) - 1, middle + 1, 0))
    return [own, *found]


def timed(
    runs: Sequence[TimedCall], device: torch.device, threads: int, times: int = 15, warm_up: int = 1
) -> list[float]:
    """Nanoseconds of one call of each of ``runs``, which take turns so that all see the same machine.

    A turn is a few calls in a row, after ``warm_up`` for nothing: since the last turn the others have taken the
    processor's caches, and pushed out what oneDNN keeps, 1024 compiled kernels, fewer than some dozen networks have.

    Example:
        >>> len(timed([lambda: None, lambda: 1], torch.device("cpu"), 1, times=3))
        2
    """
    now, found = clock(device, threads), [list[float]() for _ in runs]
    for index in rounds(len(runs), -(-times // IN_A_ROW)):
        for _ in range(warm_up):
            runs[index]()
        found[index] += [elapsed(runs[index], device, now) for _ in range(IN_A_ROW)]
    return [quick(each) for each in found]
