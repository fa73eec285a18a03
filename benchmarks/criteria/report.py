"""The tables and the picture of ``python -m benchmarks.criteria``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.pages import mean_spread, replace_between, save_runs

Row = dict[str, Any]
SCORES = {"brain": "test mIoU, U-Net on BrainSlices", "digits": "test accuracy, ResNet on digits"}
THEIRS, DENSE = "torch-pruning", "dense"
SHOWN = (
    "random",
    "IPAD, omega 1",
    "LAMP",
    "Taylor, gates",
    "torch-pruning Taylor",
    "torch-pruning Taylor, limits",
)


def scores(rows: Sequence[Row], task: str, method: str, budget: float) -> list[float]:
    """One per seed."""
    wanted = (task, method, budget)
    return [row["score"] for row in rows if (row["task"], row["method"], row["budget"]) == wanted]


def mean(rows: Sequence[Row], task: str, method: str, budget: float) -> float:
    found = scores(rows, task, method, budget)
    return statistics.fmean(found) if found else float("nan")


def methods(rows: Sequence[Row], task: str) -> list[str]:
    """Dense first, then by their mean over all budgets, best first."""
    found = list(dict.fromkeys(row["method"] for row in rows if row["task"] == task))
    every = {m: [row["score"] for row in rows if (row["task"], row["method"]) == (task, m)] for m in found}
    return sorted(found, key=lambda m: (m != DENSE, -statistics.fmean(every[m])))


def budgets(rows: Sequence[Row]) -> list[float]:
    return sorted({row["budget"] for row in rows}, reverse=True)


def table(rows: Sequence[Row], task: str) -> list[str]:
    """One row per method, one column per share of the MACs."""
    shares = budgets(rows)
    lines = [
        f"| {SCORES[task]} | " + " | ".join(f"{share:.0%}" for share in shares) + " | mean | seeds |",
        "|:--|" + "--:|" * (len(shares) + 2),
    ]
    for method in methods(rows, task):
        every = [scores(rows, task, method, share) for share in shares]
        average = statistics.fmean([value for values in every for value in values])
        cells = [mean_spread(values) for values in every]
        lines.append(f"| {method} | {' | '.join(cells)} | {average:.3f} | {max(map(len, every))} |")
    return lines


def best(rows: Sequence[Row], task: str, budget: float, theirs: bool) -> tuple[str, float]:
    """The method with the highest mean, and that mean."""
    found = [m for m in methods(rows, task) if m != DENSE and m.startswith(THEIRS) == theirs]
    means = {m: mean(rows, task, m, budget) for m in found if scores(rows, task, m, budget)}
    return max(means.items(), key=lambda item: item[1], default=("none", float("nan")))


def verdict(rows: Sequence[Row], task: str) -> list[str]:
    """The best of ours against the best of theirs and the dense network, per share."""
    lines = []
    for share in budgets(rows):
        (name, ours), (other, theirs) = (best(rows, task, share, side) for side in (False, True))
        against = f"{ours - theirs:+.3f} against {other}, {ours - mean(rows, task, DENSE, share):+.3f} dense"
        lines.append(f"- {share:.0%}: the best of ours, {name}, has {ours:.3f}: {against}")
    return lines


def write(rows: Sequence[Row], docs: Path) -> None:
    """JSON, picture, and the tables into ``criteria.md``, between its two marks."""
    head = save_runs(rows, docs / "criteria.json")
    tools = ", ".join(f"{name} {head['versions'].get(name, '?')}" for name in ("torch", "torch-pruning"))
    said = f"{head['date']} · {tools} · one thread · "
    said += "`python -m benchmarks.criteria`. Mean ± sample standard deviation over seeds, by mean over all shares."
    tasks = [task for task in SCORES if any(row["task"] == task for row in rows)]
    text = [line for task in tasks for line in ("", *table(rows, task), "", *verdict(rows, task))]
    replace_between(docs / "criteria.md", "study", "\n".join([said, *text]))
    draw(rows, tasks, docs / "criteria.png")


def style(method: str) -> dict[str, Any]:
    """The same for a method in every panel."""
    if method == DENSE:
        return {"color": "black", "linestyle": "--", "label": method}
    if method not in SHOWN:
        return {"color": "0.87", "zorder": 0}
    return {"color": f"C{SHOWN.index(method)}", "marker": "o", "markersize": 4, "label": method}


def draw(rows: Sequence[Row], tasks: Sequence[str], path: Path) -> None:
    """Score against MACs left; a few by name, the others in grey."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(10, 4), squeeze=False)
    shares = budgets(rows)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in methods(rows, task):
            values = [mean(rows, task, method, share) for share in shares]
            axis.plot(shares, values, **style(method))
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{share:.0%}" for share in shares], minor=False)
        axis.minorticks_off()
        axis.invert_xaxis()
        axis.set_title(SCORES[task], fontsize=10)
        axis.set_xlabel("MACs left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.legend(
        handles, labels, fontsize=8, ncol=4, loc="lower center", title="grey: all others", title_fontsize=8
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
