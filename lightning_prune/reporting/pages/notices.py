"""What a reader of a page must know before its figures: what failed, is missing, or is no number."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_prune.reporting.pages.charts import RESOURCES
from lightning_prune.reporting.pages.run_files import RunFiles
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.reporting.scores import Metric
from lightning_prune.utils.formatting import counted

__all__ = ["notices_of"]

SHORT = 300  # characters of an error

Notice = tuple[str, str]  # its class in the style sheet, and its text


def notices_of(run: RunFiles, score: Metric | None) -> list[Notice]:
    """Return the notices of a run, the most important ones first."""
    return [
        *_status(run),
        *(("", note) for note in run.notes),
        *_without_numbers(run.summary),
        *_budget(run),
        *_repairs(run.summary),
        *_scores(run.summary, score),
    ]


def _status(run: RunFiles) -> Iterator[Notice]:
    summary = run.summary
    if summary.status == "failed":
        yield "bad", f"The run failed: {summary.error[:SHORT] or 'there is no message'}"
    elif summary.status == "interrupted":
        yield "", "The run was interrupted: it has no scores on the test set, and can be continued."
    elif summary.status != "completed" and (
        summary.error or not run.notes
    ):  # which say why it has no summary
        yield "", f"The run is {summary.status}. {summary.error[:SHORT]}".strip()


def _without_numbers(summary: Summary) -> Iterator[Notice]:
    """Yield a sentence on metrics that are NaN or infinite, as those of a training that diverged."""
    first: dict[str, int] = {}
    for row in summary.curves:
        for name, value in row.items():
            if not math.isfinite(value) and not name.startswith("val/iou_"):  # of a class that is nowhere
                first.setdefault(name, int(row["epoch"]) + 1)
    if first:
        names = ", ".join(f"{name} (from epoch {epoch})" for name, epoch in first.items())
        yield "bad", f"Not a number, and left out of the curves: {names}. Did the training diverge?"


def _budget(run: RunFiles) -> Iterator[Notice]:
    prune = run.config.get("prune")
    budget = prune.get("budget") if isinstance(prune, dict) else None
    share = run.summary.cuts[-1].get("share", {}) if run.summary.cuts else {}
    for name, aim in budget.items() if isinstance(budget, dict) else ():
        left = share.get(name)
        if isinstance(aim, (int, float)) and aim <= 1 and left is not None and left > aim:
            what = RESOURCES.get(name, name)
            yield "", f"The budget of {what} is not met: {left:.1%} are left, {aim:.1%} were asked for."


def _repairs(summary: Summary) -> Iterator[Notice]:
    reasons = dict.fromkeys(cut["not_repaired"] for cut in summary.cuts if cut.get("not_repaired"))
    for reason in reasons:
        number = sum(cut.get("not_repaired") == reason for cut in summary.cuts)
        verb = "was" if number == 1 else "were"
        yield "", f"{number} of {counted(len(summary.cuts), 'cut')} {verb} not repaired: {reason}"


def _scores(summary: Summary, score: Metric | None) -> Iterator[Notice]:
    if score is None and summary.status == "completed":
        yield "", "No metric of a validation or test set was logged, so there is no score."
