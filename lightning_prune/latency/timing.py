"""Time calls on a machine that also does other work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

__all__ = [
    "TimedCall",
    "clock_for",
    "elapsed_time",
    "paired_ratio",
    "sample_times",
    "time_against_reference",
    "time_calls",
    "turn_order",
    "undisturbed_time",
]

#: does the work that is timed, once
TimedCall = Callable[[], object]
CALLS_PER_TURN = 3
UNDISTURBED_QUANTILE = 0.1
CALLS_PER_PAIR, PAIR_SECONDS = 10, 2.0
GPU_QUEUE = 20  # calls between two waits, so that the launches of one overlap with the work of the other


def clock_for(device: torch.device, threads: int) -> Callable[[], int]:
    """Return a clock in nanoseconds: processor time if one thread does all the work, otherwise wall-clock time.

    Processor time leaves out the time in which other processes use the processor.

    Example:
        >>> clock_for(torch.device("cpu"), 1).__name__, clock_for(torch.device("cpu"), 2).__name__
        ('thread_time_ns', 'perf_counter_ns')
    """
    return time.thread_time_ns if device.type == "cpu" and threads == 1 else time.perf_counter_ns


def elapsed_time(
    call: TimedCall, device: torch.device, clock: Callable[[], int], gpu_queue: int = GPU_QUEUE
) -> float:
    """Return the nanoseconds of one call; on a GPU, the mean of ``gpu_queue`` calls that are queued at once."""
    number = gpu_queue if device.type == "cuda" else 1
    _wait(device)
    start = clock()
    for _ in range(number):
        call()
    _wait(device)
    return (clock() - start) / number


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turn_order(number: int, turns: int) -> Iterator[int]:
    """Yield the indices 0 to ``number - 1`` once per turn, in every other turn backwards.

    A disturbance that comes in step with the turns so does not always hit the same index.

    Example:
        >>> list(turn_order(3, 2))
        [0, 1, 2, 2, 1, 0]
    """
    for turn in range(turns):
        yield from reversed(range(number)) if turn % 2 else range(number)


def sample_times(
    calls: Sequence[TimedCall],
    device: torch.device,
    clock: Callable[[], int],
    turns: int,
    *,
    calls_per_turn: int = 1,
    warm_up: int = 0,
    gpu_queue: int = GPU_QUEUE,
) -> list[list[float]]:
    """Time calls that take turns, so that all of them are measured under the same conditions.

    Args:
        calls: what to time.
        device: that they run on.
        clock: in nanoseconds; see :func:`clock_for`.
        turns: of each call.
        calls_per_turn: timed calls in a row in each turn.
        warm_up: calls before those, not timed.
        gpu_queue: on a GPU, how many calls make up one time.

    Returns:
        For each call its nanoseconds, in the order in which they were measured.

    Example:
        >>> times = sample_times([lambda: None, lambda: 1], torch.device("cpu"), time.perf_counter_ns, turns=3)
        >>> [len(samples) for samples in times]
        [3, 3]
    """
    samples = [list[float]() for _ in calls]
    for index in turn_order(len(calls), turns):
        for _ in range(warm_up):
            calls[index]()
        samples[index] += [
            elapsed_time(calls[index], device, clock, gpu_queue) for _ in range(calls_per_turn)
        ]
    return samples


def undisturbed_time(times: Sequence[float]) -> float:
    """Return the tenth percentile: the time of a call that nothing disturbs.

    Other processes evict this process's data from the caches now and then, which shows in processor time too. The
    median contains such calls, and the ratio of two medians varies more.

    Example:
        >>> undisturbed_time([float(n) for n in range(11)])
        1.0
    """
    return float(np.quantile(times, UNDISTURBED_QUANTILE))


def time_calls(
    calls: Sequence[TimedCall], device: torch.device, threads: int, times: int = 15, warm_up: int = 1
) -> list[float]:
    """Return the undisturbed nanoseconds of each call, with at least ``times`` samples of each.

    Each turn begins with ``warm_up`` calls that are not timed: since a call's last turn, the others have replaced
    its data in the processor's caches, and its kernels in oneDNN's cache, which holds 1024 compiled kernels: a few
    dozen networks have more.

    Example:
        >>> len(time_calls([lambda: None, lambda: 1], torch.device("cpu"), 1, times=3))
        2
    """
    turns = -(-times // CALLS_PER_TURN)  # rounded up
    clock = clock_for(device, threads)
    samples = sample_times(calls, device, clock, turns, calls_per_turn=CALLS_PER_TURN, warm_up=warm_up)
    return [undisturbed_time(call_samples) for call_samples in samples]


def time_against_reference(
    reference: TimedCall, others: Sequence[TimedCall], device: torch.device, threads: int, times: int = 15
) -> list[float]:
    """Return the times as :func:`time_calls` does, the reference first, for ratios to the reference.

    An error in the reference's time would be an error in every ratio. So it gets three times as many samples as the
    others, at the beginning, in the middle and at the end of each turn.

    Example:
        >>> len(time_against_reference(lambda: None, [lambda: 1], torch.device("cpu"), 1, times=3))
        2
    """
    half = len(others) // 2
    first_half, second_half = others[:half], others[half:]
    calls = [reference, *first_half, reference, *second_half, reference]
    nanoseconds = time_calls(calls, device, threads, times)
    middle = half + 1
    reference_time = statistics.median([nanoseconds[0], nanoseconds[middle], nanoseconds[-1]])
    return [reference_time, *nanoseconds[1:middle], *nanoseconds[middle + 1 : -1]]


def paired_ratio(reference: TimedCall, other: TimedCall, device: torch.device, threads: int) -> float:
    """Return the time of a call as a share of that of a reference, for networks of any speed.

    Both are called in turns, ten times each. The result is the median over turns of the ratio of the shortest times:
    clock rate and caches change within seconds on a machine that also does other work, and such changes act on
    neighbouring turns alike. There are turns for about two seconds, 5 to 60.

    Example:
        >>> 0 < paired_ratio(lambda: sum(range(20000)), lambda: sum(range(100)), torch.device("cpu"), 1) < 0.5
        True
    """
    clock = clock_for(device, threads)
    reference()
    first = elapsed_time(reference, device, clock)
    number = int(min(max(PAIR_SECONDS * 1e9 / (2 * CALLS_PER_PAIR * max(first, 1.0)), 5), 60))
    times = sample_times([reference, other], device, clock, number, calls_per_turn=CALLS_PER_PAIR, warm_up=1)
    shortest = np.array(times).reshape(2, number, CALLS_PER_PAIR).min(2)
    return float(np.median(shortest[1] / shortest[0]))
