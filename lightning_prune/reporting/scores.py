"""The score of a run: which metric it is, and its values on the validation set, to choose by, and the test set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_prune.reporting.run_folder import Summary
from lightning_prune.utils.hints import did_you_mean
from lightning_prune.utils.metrics import SCORE_LABELS, higher_is_better

__all__ = ["Metric", "curve", "metric_of"]

STAGES = ("train", "val", "test")
LOSS = "loss"


@dataclass(frozen=True)
class Metric:
    """A metric that runs are compared by.

    Attributes:
        name: without its stage: ``"miou"``.
    """

    name: str

    @property
    def label(self) -> str:
        """What reports call it."""
        return SCORE_LABELS.get(self.name, self.name)

    @property
    def higher_is_better(self) -> bool:
        """Whether it rises as networks get better."""
        return higher_is_better(self.name)

    def test(self, summary: Summary) -> float:
        """Return its value on the test set; NaN if there is none."""
        return summary.test.get(self.name, math.nan)

    def validation(self, summary: Summary) -> float:
        """Return its value for the final network on the validation set; NaN if there is none.

        Runs are chosen by this value, never by that on the test set. For runs that were not validated at their end,
        it is that of the last epoch, measured before the cut of that epoch.
        """
        if self.name in summary.val:
            return summary.val[self.name]
        _, values = curve(summary, f"val/{self.name}")
        return next((value for value in reversed(values) if not math.isnan(value)), math.nan)

    def before_first_cut(self, summary: Summary) -> float:
        """Return its value on the validation set right before the first cut; NaN if there is none."""
        first = summary.cuts[0].get("epoch") if summary.cuts else None
        rows = [row for row in summary.curves if row.get("epoch") == first]
        return next((row[f"val/{self.name}"] for row in rows if f"val/{self.name}" in row), math.nan)


def curve(summary: Summary, name: str) -> tuple[list[float], list[float]]:
    """Return numbers of trained epochs, and the values of a metric with its stage after them.

    Example:
        >>> curve(Summary(curves=[{"epoch": 0, "val/miou": 0.5}, {"epoch": 1}]), "val/miou")
        ([1], [0.5])
    """
    rows = [row for row in summary.curves if name in row]
    return [row["epoch"] + 1 for row in rows], [row[name] for row in rows]


def metric_of(summaries: Iterable[Summary], name: str | None = None) -> Metric | None:
    """Return the metric to compare runs by.

    Args:
        summaries: of the runs.
        name: with or without its stage; None: the main score of a task, else the first metric of the validation set
            other than its loss, else the loss; None is returned if nothing was logged.

    Raises:
        ValueError: no run has logged a metric of this name.

    Example:
        >>> run = Summary(curves=[{"epoch": 0, "val/loss": 1.0, "val/miou": 0.5}])
        >>> metric_of([run]).label
        'mIoU'
        >>> metric_of([run], "val/moiu")
        Traceback (most recent call last):
        ValueError: nobody logged 'val/moiu'; did you mean 'miou'? Logged were: loss, miou
    """
    logged = _logged(summaries)
    if name is not None:
        return Metric(_known(name, logged))
    main = [each for each in SCORE_LABELS if each in logged]
    others = [each for each in logged if each != LOSS and not each.startswith("iou_")]
    chosen = next(iter([*main, *others, *logged]), None)
    return None if chosen is None else Metric(chosen)


def _known(name: str, logged: Sequence[str]) -> str:
    """Return a name without its stage."""
    stage, _, short = name.partition("/")
    short = short if stage in STAGES else name
    if short in logged:
        return short
    parts = [f"nobody logged {name!r};", did_you_mean(short, logged, "'{}'")]
    raise ValueError(" ".join([*filter(None, parts), f"Logged were: {', '.join(logged) or 'no metrics'}"]))


def _logged(summaries: Iterable[Summary]) -> list[str]:
    """Return the names of all metrics of validation and test set, without their stages."""
    names: dict[str, None] = {}
    for summary in summaries:
        rows = [key for row in summary.curves for key in row if key.startswith("val/")]
        names |= dict.fromkeys(key.removeprefix("val/") for key in rows)
        names |= dict.fromkeys([*summary.val, *summary.test])
    return list(names)
