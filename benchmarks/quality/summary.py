"""Numbers of the study's page: medians, intervals of paired differences, collapses, ranks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common.intervals import Interval, interval
from benchmarks.quality.plan import LABELS

__all__ = ["Key", "Results", "flat"]

Row = dict[str, Any]
#: task, method, whether it is repaired, share of the MACs
Key = tuple[str, str, bool, float]
LOST, PRESENT = 0.05, 0.2  # IoU of a class below which it is lost, and above which the dense network has it
SEGMENTATION = ("scenes", "brain")
COMMON = ("task", "method", "seed", "repair", "machine")


def flat(run: Mapping[str, Any]) -> Iterator[Row]:
    """Yield one plain row for each stage of a run, and one for its dense network with share 1."""
    task, dense, common = run["task"], run["dense"], {k: run[k] for k in COMMON if k in run}
    yield {**common, "share": 1.0, "val": dense["val"]["value"], "test": dense["test"]["value"]}
    for stage in run["stages"]:
        row = {**common, "share": stage["share"], "macs": stage["macs"], "params": stage["params"]}
        row |= {"val": stage["trained"]["val"]["value"], "test": stage["trained"]["test"]["value"]}
        row["collapsed"] = collapsed(task, stage["trained"]["test"], dense["test"])
        if "cut" in stage:
            row |= {"cut_val": stage["cut"]["val"]["value"], "cut_test": stage["cut"]["test"]["value"]}
            row |= {"undone": stage["undone"], "cut_seconds": stage["cut_seconds"]}
        yield row


def collapsed(task: str, score: Mapping[str, Any], dense: Mapping[str, Any]) -> bool:
    """Return whether a class is lost (segmentation), or less than half of the accuracy is left.

    Example:
        >>> dense = {"value": 0.7, "classes": [0.9, 0.5]}
        >>> collapsed("scenes", {"value": 0.47, "classes": [0.9, 0.04]}, dense)
        True
        >>> collapsed("fashion", {"value": 0.36, "classes": [0.7, 0.02]}, dense)
        False
    """
    if task.split("-")[0] in SEGMENTATION:
        pairs = zip(score["classes"], dense["classes"], strict=True)
        return any(now < LOST and before > PRESENT for now, before in pairs)
    return bool(score["value"] < dense["value"] / 2)


class Results:
    """The rows of a study by task, method, repair and share.

    Args:
        rows: from :func:`flat`.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_key: dict[Key, dict[int, Row]] = defaultdict(dict)
        self._rows = list(rows)
        for row in self._rows:
            self._by_key[row["task"], row["method"], row["repair"], row["share"]][row["seed"]] = row

    def of_length(self, long: bool) -> Results:
        """Return the part with longer training, or the rest."""
        return Results(row for row in self._rows if row["task"].endswith("-long") == long)

    @property
    def tasks(self) -> list[str]:
        """The tasks that have runs, in the order of the page."""
        present = {task for task, *_ in self._by_key}
        return [task for task in LABELS if task in present]

    def methods(self, task: str) -> list[tuple[str, bool]]:
        """Return the methods of a task with their repair."""
        return list(dict.fromkeys((m, r) for name, m, r, _ in self._by_key if name == task))

    def values(self, key: Key, column: str = "test") -> dict[int, float]:
        """Return the values of a column by seed."""
        rows = self._by_key.get(key, {})
        return {seed: row[column] for seed, row in sorted(rows.items()) if column in row}

    def median(self, key: Key, column: str = "test") -> float:
        """Return the median over seeds; NaN without a run."""
        values = self.values(key, column)
        return statistics.median(values.values()) if values else math.nan

    def dense(self, task: str) -> dict[int, float]:
        """Return the test scores of the dense networks by seed."""
        keys = [key for key in self._by_key if key[0] == task and key[3] == 1.0]
        return {seed: value for key in keys for seed, value in self.values(key).items()}

    def dense_median(self, task: str) -> float:
        """Return the median of the test scores of the dense networks; NaN without one."""
        scores = self.dense(task).values()
        return statistics.median(scores) if scores else math.nan

    def difference(self, key: Key, other: Key, column: str = "test") -> Interval:
        """Return the interval of the differences over the seeds that both have."""
        ours, theirs = self.values(key, column), self.values(other, column)
        return interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def from_dense(self, key: Key) -> Interval:
        """Return the interval of the differences from the dense network of the same seed."""
        ours, dense = self.values(key), self.dense(key[0])
        return interval([ours[seed] - dense[seed] for seed in ours if seed in dense])

    def pooled(self, row: tuple[str, bool], other: tuple[str, bool], share: float) -> Interval:
        """Return the interval of the differences over all tasks and seeds together."""
        pairs = [
            (self.values((task, *row, share)), self.values((task, *other, share))) for task in self.tasks
        ]
        return interval([a[seed] - b[seed] for a, b in pairs for seed in a if seed in b])

    def pooled_from_dense(self, row: tuple[str, bool], share: float) -> Interval:
        """Return the interval of the differences from the dense networks over all tasks and seeds."""
        values = [(self.values((task, *row, share)), self.dense(task)) for task in self.tasks]
        return interval([a[seed] - b[seed] for a, b in values for seed in a if seed in b])

    def ranking(self, task: str, names: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float]]:
        """Return repaired methods by their mean on validation over ``shares``, best first.

        Only seeds that all of them have are used.
        """
        common = self.common_seeds(task, names, shares)
        means = {
            name: statistics.fmean(
                self.values((task, name, True, share), "val")[seed] for share in shares for seed in common
            )
            for name in names
            if common
        }
        return sorted(means.items(), key=lambda item: -item[1])

    def common_seeds(self, task: str, names: Sequence[str], shares: Sequence[float]) -> list[int]:
        """Return the seeds that all repaired methods have at all shares."""
        sets = [set(self.values((task, name, True, share))) for name in names for share in shares]
        return sorted(set.intersection(*sets)) if sets else []
