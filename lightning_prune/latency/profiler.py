"""Measure a network's parts over their channel counts (level 3)."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_prune.latency.backends import EXECUTIONS, ExecutionName, Piece
from lightning_prune.latency.interpolation import Lookup, levels
from lightning_prune.latency.timing import clock, elapsed, quick, rounds, timed

__all__ = ["BackendSettings", "TimingCurve", "Track", "entries"]

#: shows how far something is: iterates over what it is given
Track = Callable[[Sequence[int]], Iterable[int]]
ROUNDS, REPEATS = 3, 3
SLOW, VERY_SLOW = 5e6, 20e6  # nanoseconds of one run, above which fewer runs, and fewer counts, must do
SHARES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75, 1.0)  # of the channels, for what has more than two axes


@dataclass(frozen=True)
class BackendSettings:
    """Where and how something runs."""

    execution: ExecutionName
    device: torch.device
    threads: int

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """As it shall be while measuring: the number of threads, no gradients, no tiny numbers that slow down."""
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
    """Nanoseconds of one kind of piece, by its channel counts or by its volume."""

    by: Literal["counts", "volume"]
    lookup: Lookup

    def time(self, piece: Piece, *counts: int) -> float:
        """Nanoseconds of ``piece`` with ``counts`` channels along each axis."""
        return self.lookup(*counts) if self.by == "counts" else self.lookup(piece.volume(counts))


@dataclass
class _Point:
    """A piece at some channel counts, and its times."""

    piece: Piece
    counts: tuple[int, ...]
    times: list[float] = field(default_factory=list)
    share: float = 1.0
    failed: str = ""

    def visit(self, place: BackendSettings, now: Callable[[], int]) -> None:
        """Run it a few times, once for nothing."""
        if self.failed or (self.times and self.times[0] > VERY_SLOW):
            return
        try:
            run = self.piece.run(self.counts, place.device)
            if not self.times:
                self.share = self.piece.share(self.counts, place.device)
            first = elapsed(run, place.device, now)
            repeats = REPEATS if first < SLOW else 1
            for _ in range(repeats):
                self.times.append(elapsed(run, place.device, now))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self.failed = str(error)


def entries(
    pieces: Sequence[Piece], place: BackendSettings, track: Track = lambda indices: indices
) -> tuple[dict[str, TimingCurve], list[str]]:
    """Time every kind of piece over a grid of channel counts, in turns.

    Args:
        pieces: of a network; those of one kind are measured once, up to the largest counts.
        place: where to run them.
        track: shows progress.

    Returns:
        The entry of each signature, and the signatures of those that cannot be run alone.
    """
    now = clock(place.device, place.threads)
    kinds: dict[str, list[Piece]] = {}
    for piece in pieces:
        kinds.setdefault(piece.signature, []).append(piece)
    with place.settled():
        points = {kind: list(_points(alike, place, now)) for kind, alike in kinds.items()}
        flat = [point for each in points.values() for point in each]
        for index in track(list(rounds(len(flat), ROUNDS))):
            flat[index].visit(place, now)
        idle = _idle(place)
    found = {kind: _entry(each, idle) for kind, each in points.items()}
    return {k: e for k, e in found.items() if e is not None}, [k for k, e in found.items() if e is None]


def _points(alike: Sequence[Piece], place: BackendSettings, now: Callable[[], int]) -> Iterator[_Point]:
    """What to measure of pieces of one kind."""
    first = alike[0]
    if not first.on_grid:
        for piece, share in itertools.product({piece.most: piece for piece in alike}.values(), SHARES):
            sizes = zip(piece.most, piece.steps, strict=True)
            yield _Point(piece, tuple(max(step, int(most * share) // step * step) for most, step in sizes))
        return
    most = tuple(max(counts) for counts in zip(*(piece.most for piece in alike), strict=True))
    dense = _Point(first, most)
    dense.visit(place, now)
    fine = not dense.times or dense.times[0] < VERY_SLOW
    axes = [
        levels(*each) for each in zip(most, first.steps, [fine] * len(most), first.multiples, strict=True)
    ]
    yield from (_Point(first, counts) for counts in itertools.product(*axes))


def _idle(place: BackendSettings) -> float:
    """Nanoseconds of every call that are not the piece's own."""
    idle = EXECUTIONS[place.execution].idle
    return timed([idle(place.device)], place.device, place.threads)[0] if idle else 0.0


def _entry(points: Sequence[_Point], idle: float) -> TimingCurve | None:
    """A grid where all of it could be run; else by volume what could."""

    def typical(point: _Point) -> float:
        return point.share * max(quick(point.times) - idle, 0.0)

    good = [point for point in points if not point.failed]
    if not good:
        return None
    if good[0].piece.on_grid and len(good) == len(points):
        axes = tuple(
            tuple(sorted(set(axis))) for axis in zip(*(point.counts for point in points), strict=True)
        )
        values = tuple(typical(point) for point in points)
        return TimingCurve("counts", Lookup(axes, values, tuple(good[0].piece.multiples)))
    by_volume: dict[int, list[float]] = {}
    for point in good:
        by_volume.setdefault(point.piece.volume(point.counts), []).append(typical(point))
    volumes = sorted(by_volume)
    return TimingCurve(
        "volume", Lookup((tuple(volumes),), tuple(statistics.median(by_volume[v]) for v in volumes))
    )
