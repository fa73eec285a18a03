"""Find the same image in two stages, by its content and by its name."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

__all__ = ["warn_of_duplicates", "warn_of_few"]

FEW = 3
BLOCK = 1 << 16  # bytes from the middle of a file that are compared first
Place = tuple[str, Path]  # stage and file


def warn_of_few(number: int, what: str = "pairs of image and mask") -> None:
    """Warn if there are so few samples that nothing can be learnt or said from them."""
    if number <= FEW:
        warnings.warn(
            f"only {number} {what}: enough to try whether everything runs, too few to train or to judge a network",
            stacklevel=3,
        )


def warn_of_duplicates(stages: Mapping[str, Mapping[str, Path]]) -> None:
    """Warn if two stages share an image: files of equal content, or of equal name.

    Args:
        stages: stage -> name of an image below the folder of its stage -> its file.
    """
    places = [(stage, file) for stage, files in stages.items() for file in files.values()]
    same = _groups(places)
    for first, second in combinations(stages, 2):
        pairs = [pair for group in same if (pair := _pair_of(group, first, second))]
        _warn(first, second, pairs, "the same images", "scores on them are too good; leave one of each out")
        equal = {frozenset(pair) for pair in pairs}
        shared = stages[first].keys() & stages[second].keys()
        both = [(stages[first][name], stages[second][name]) for name in sorted(shared)]
        named = [pair for pair in both if frozenset(pair) not in equal]
        advice = "their contents differ; if they show the same, leave one of each out"
        _warn(first, second, named, "images of the same name", advice)


def _warn(first: str, second: str, pairs: Sequence[tuple[Path, Path]], what: str, advice: str) -> None:
    if pairs:
        one, other = pairs[0]
        times = "once" if len(pairs) == 1 else f"{len(pairs)} times"
        warnings.warn(
            f"{first} and {second} have {what} {times}, such as {one} and {other}: {advice}",
            stacklevel=4,
        )


def _pair_of(group: Sequence[Place], first: str, second: str) -> tuple[Path, Path] | None:
    """Return a file of the first and one of the second stage, if the group has both."""
    files = dict(reversed(group))
    return (files[first], files[second]) if first in files and second in files else None


def _groups(places: Sequence[Place]) -> list[list[Place]]:
    """Return the groups of equal files that are in several stages; only files of equal size are read."""
    groups = [list(places)]
    for key in (_size, _digest_of_block, _digest):
        groups = [part for group in groups for part in _split(group, key)]
    return groups


def _split(group: Sequence[Place], key: Callable[[Path], Hashable]) -> list[list[Place]]:
    parts: dict[Hashable, list[Place]] = defaultdict(list)
    for stage, file in group:
        parts[key(file)].append((stage, file))
    return [part for part in parts.values() if len({stage for stage, _ in part}) > 1]


def _size(file: Path) -> int:
    return file.stat().st_size


def _digest_of_block(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size // 2 - BLOCK // 2))
        return hashlib.sha256(opened.read(BLOCK)).digest()


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
