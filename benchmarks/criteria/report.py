"""Tables and picture of ``python -m benchmarks.criteria``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.pages import RESULTS, ReportFiles, mean_spread
from benchmarks.common.studies import Row

SCORES = {"brain": "test mIoU, U-Net on BrainSlices", "digits": "test accuracy, ResNet on digits"}
THEIRS, DENSE = "torch-pruning", "dense"
HIGHLIGHTED = (
    "random",
    "IPAD, omega 1",
    "LAMP",
    "Taylor, gates",
    "torch-pruning Taylor",
    "torch-pruning Taylor, limits",
)


def scores(rows: Sequence[Row], task: str, method: str, budget: float) -> list[float]:
    """Return the scores of all seeds."""
    key = (task, method, budget)
    return [row["score"] for row in rows if (row["task"], row["method"], row["budget"]) == key]


def mean(rows: Sequence[Row], task: str, method: str, budget: float) -> float:
    """Return the mean score over seeds, NaN without a run."""
    values = scores(rows, task, method, budget)
    return statistics.fmean(values) if values else float("nan")


def methods(rows: Sequence[Row], task: str) -> list[str]:
    """Return the names of the methods: dense first, then by the mean over all budgets, best first."""
    names = list(dict.fromkeys(row["method"] for row in rows if row["task"] == task))
    values = {m: [row["score"] for row in rows if (row["task"], row["method"]) == (task, m)] for m in names}
    return sorted(names, key=lambda m: (m != DENSE, -statistics.fmean(values[m])))


def budgets(rows: Sequence[Row]) -> list[float]:
    """Return the shares of MACs, largest first."""
    return sorted({row["budget"] for row in rows}, reverse=True)


def table(rows: Sequence[Row], task: str) -> list[str]:
    """Return the lines of the table: one row per method, one column per share of the MACs."""
    shares = budgets(rows)
    lines = [
        f"| {SCORES[task]} | " + " | ".join(f"{share:.0%}" for share in shares) + " | mean | seeds |",
        "|:--|" + "--:|" * (len(shares) + 2),
    ]
    for method in methods(rows, task):
        columns = [scores(rows, task, method, share) for share in shares]
        average = statistics.fmean([value for values in columns for value in values])
        cells = [mean_spread(values) for values in columns]
        lines.append(f"| {method} | {' | '.join(cells)} | {average:.3f} | {max(map(len, columns))} |")
    return lines


def best(rows: Sequence[Row], task: str, budget: float, theirs: bool) -> tuple[str, float]:
    """Return the method with the highest mean, and that mean, among ours or those of torch-pruning."""
    names = [m for m in methods(rows, task) if m != DENSE and m.startswith(THEIRS) == theirs]
    means = {m: mean(rows, task, m, budget) for m in names if scores(rows, task, m, budget)}
    return max(means.items(), key=lambda item: item[1], default=("none", float("nan")))


def verdict(rows: Sequence[Row], task: str) -> list[str]:
    """Return a line for each share: our best method compared with theirs and with the dense network."""
    lines = []
    for share in budgets(rows):
        (name, ours), (other, theirs) = (best(rows, task, share, side) for side in (False, True))
        dense = mean(rows, task, DENSE, share)
        difference = f"{ours - theirs:+.3f} against {other}, {ours - dense:+.3f} against dense"
        lines.append(f"- {share:.0%}: our best, {name}, has {ours:.3f}: {difference}")
    return lines


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write JSON, picture, and the section ``study`` of ``criteria.md``; without rows, from the stored JSON."""
    files = ReportFiles("criteria", folder)
    content = files.save_runs(rows)
    files.write_section("study", section(content))
    draw(content["runs"], tasks(content["runs"]), files.figure)


def tasks(rows: Sequence[Row]) -> list[str]:
    """Return the tasks that have a run."""
    return [task for task in SCORES if any(row["task"] == task for row in rows)]


def section(content: dict[str, Any]) -> str:
    """Return the tables and comparisons (Markdown) of the stored numbers."""
    rows, versions = content["runs"], content["versions"]
    tools = ", ".join(f"{name} {versions.get(name, '?')}" for name in ("torch", "torch-pruning"))
    head = (
        f"{content['date']} · {tools} · one thread · `python -m benchmarks.criteria`. Columns: share of the MACs. "
        "Mean ± sample standard deviation over seeds; ordered by the mean over all shares."
    )
    lines = [line for task in tasks(rows) for line in ("", *table(rows, task), "", *verdict(rows, task))]
    return "\n".join([head, *lines])


def style(method: str) -> dict[str, Any]:
    """Return the style of a method's line, the same in all panels."""
    if method == DENSE:
        return {"color": "black", "linestyle": "--", "label": method}
    if method not in HIGHLIGHTED:
        return {"color": "0.87", "zorder": 0}
    return {"color": f"C{HIGHLIGHTED.index(method)}", "marker": "o", "markersize": 4, "label": method}


def draw(rows: Sequence[Row], tasks: Sequence[str], path: Path) -> None:
    """Draw score over MACs left, one panel per task; a few methods have names, the others are grey."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(10, 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        draw_task(axis, rows, task)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.legend(
        handles, labels, fontsize=8, ncol=4, loc="lower center", title="grey: all others", title_fontsize=8
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_task(axis: Any, rows: Sequence[Row], task: str) -> None:
    """Draw the panel of one task."""
    shares = budgets(rows)
    for method in methods(rows, task):
        axis.plot(shares, [mean(rows, task, method, share) for share in shares], **style(method))
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares], minor=False)
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.set_title(SCORES[task], fontsize=10)
    axis.set_xlabel("MACs left")
