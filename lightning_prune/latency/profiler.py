"""Measure the parts of a network over their channel counts."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_prune.latency.backends import EXECUTIONS, ExecutionName, Piece
from lightning_prune.latency.interpolation import Lookup, grid_counts
from lightning_prune.latency.timing import clock_for, elapsed_time, time_calls, turn_order, undisturbed_time

__all__ = ["BackendSettings", "TimedPiece", "TimingCurve", "Track", "measure_curves"]

#: shows progress: iterates over the indices that it gets
Track = Callable[[Sequence[int]], Iterable[int]]
TURNS, REPEATS = 3, 3
SLOW, VERY_SLOW = 5e6, 20e6  # nanoseconds of one run, above which fewer runs, and fewer counts, are measured
SHARES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75, 1.0)  # of the channels, for pieces with more than two axes


@dataclass(frozen=True)
class BackendSettings:
    """Execution, device and threads with which networks run."""

    execution: ExecutionName
    device: torch.device
    threads: int

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Set the number of threads, disable gradients, and flush denormal numbers, which would slow down runs."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)
            torch.set_flush_denormal(False)


@dataclass(frozen=True)
class TimingCurve:
    """Nanoseconds of one kind of piece, over its channel counts or over its volume."""

    by: Literal["counts", "volume"]
    lookup: Lookup

    def time(self, piece: Piece, *counts: int) -> float:
        """Return the nanoseconds of ``piece`` with ``counts`` channels along each axis."""
        return self.lookup(*counts) if self.by == "counts" else self.lookup(piece.volume(counts))


@dataclass
class TimedPiece:
    """A piece at some channel counts, and its times.

    Attributes:
        piece: of a network.
        counts: number of channels along each of its axes.
        times: nanoseconds of each run.
        own_share: of its time alone, that it also takes within a network.
        error: why it cannot be run alone; empty if it can.
    """

    piece: Piece
    counts: tuple[int, ...]
    times: list[float] = field(default_factory=list)
    own_share: float = 1.0
    error: str = ""

    def measure(self, settings: BackendSettings, clock: Callable[[], int]) -> None:
        """Time the piece a few times, after one run to warm up; very slow pieces are timed in the first turn only."""
        if self.error or (self.times and self.times[0] > VERY_SLOW):
            return
        try:
            call = self.piece.make_call(self.counts, settings.device)
            if not self.times:
                self.own_share = self.piece.own_share(self.counts, settings.device)
            warm_up = elapsed_time(call, settings.device, clock)
            for _ in range(REPEATS if warm_up < SLOW else 1):
                self.times.append(elapsed_time(call, settings.device, clock))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self.error = str(error)


def measure_curves(
    pieces: Sequence[Piece], settings: BackendSettings, track: Track = lambda indices: indices
) -> tuple[dict[str, TimingCurve], list[str]]:
    """Time every kind of piece over a grid of channel counts, in turns.

    Args:
        pieces: of a network; pieces of one kind are measured once, up to the largest counts.
        settings: where and how to run them.
        track: shows progress.

    Returns:
        The curve of each signature, and the signatures of pieces that cannot be run alone.
    """
    clock = clock_for(settings.device, settings.threads)
    kinds: dict[str, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.signature, []).append(piece)
    with settings.active():
        call_time = _empty_call_time(
            settings
        )  # first: it also shows if the execution runs on this device at all
        points = {kind: list(_points(members, settings, clock)) for kind, members in kinds.items()}
        all_points = [point for kind_points in points.values() for point in kind_points]
        for index in track(list(turn_order(len(all_points), TURNS))):
            all_points[index].measure(settings, clock)
    curves = {kind: _curve(kind_points, call_time) for kind, kind_points in points.items()}
    measured = {kind: curve for kind, curve in curves.items() if curve is not None}
    return measured, [kind for kind, curve in curves.items() if curve is None]


def _points(
    members: Sequence[Piece], settings: BackendSettings, clock: Callable[[], int]
) -> Iterator[TimedPiece]:
    """Yield the points at which to measure the pieces of one kind."""
    first = members[0]
    if not first.on_grid:
        distinct = {piece.dense_counts: piece for piece in members}.values()
        for piece, share in itertools.product(distinct, SHARES):
            sizes = zip(piece.dense_counts, piece.steps, strict=True)
            counts = tuple(max(step, int(dense * share) // step * step) for dense, step in sizes)
            yield TimedPiece(piece, counts)
        return
    largest = tuple(max(counts) for counts in zip(*(piece.dense_counts for piece in members), strict=True))
    # Measure the largest counts first, only to find out whether the piece is slow.
    dense = TimedPiece(first, largest)
    dense.measure(settings, clock)
    fine = not dense.times or dense.times[0] < VERY_SLOW
    axes = [
        grid_counts(count, step, fine, multiple)
        for count, step, multiple in zip(largest, first.steps, first.multiples, strict=True)
    ]
    yield from (TimedPiece(first, counts) for counts in itertools.product(*axes))


def _empty_call_time(settings: BackendSettings) -> float:
    """Return the nanoseconds of a call without work, 0 if the execution has no such cost per piece."""
    empty_call = EXECUTIONS[settings.execution].empty_call
    if empty_call is None:
        return 0.0
    return time_calls([empty_call(settings.device)], settings.device, settings.threads)[0]


def _curve(points: Sequence[TimedPiece], call_time: float) -> TimingCurve | None:
    """Return times on a grid if all points could be run, else over the volume of those that could, else None."""

    def own_time(point: TimedPiece) -> float:
        return point.own_share * max(undisturbed_time(point.times) - call_time, 0.0)

    valid = [point for point in points if not point.error]
    if not valid:
        return None
    if valid[0].piece.on_grid and len(valid) == len(points):
        counts = zip(*(point.counts for point in points), strict=True)
        axes = tuple(tuple(sorted(set(axis))) for axis in counts)
        multiples = tuple(valid[0].piece.multiples)
        return TimingCurve("counts", Lookup(axes, tuple(own_time(point) for point in points), multiples))
    by_volume: dict[int, list[float]] = {}
    for point in valid:
        by_volume.setdefault(point.piece.volume(point.counts), []).append(own_time(point))
    volumes = sorted(by_volume)
    return TimingCurve(
        "volume", Lookup((tuple(volumes),), tuple(statistics.median(by_volume[v]) for v in volumes))
    )
