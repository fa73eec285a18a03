"""Table and picture of ``python -m benchmarks.distillation``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.intervals import interval
from benchmarks.common.pages import RESULTS, ReportFiles, mean_spread
from benchmarks.common.studies import Row

NAMES = {
    "none": "no distillation",
    "hinton": "Hinton",
    "attention": "attention",
    "fsp": "FSP",
    "all": "all three",
}


def scores(rows: Sequence[Row], budget: float, variant: str) -> dict[int, float]:
    """Return seed -> test mIoU."""
    return {r["seed"]: r["test_miou"] for r in rows if (r["budget"], r["variant"]) == (budget, variant)}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Format mean, sample standard deviation and number of values."""
    return f"{mean_spread(values, digits)} ({len(values)})" if values else "-"


def recovered(rows: Sequence[Row], budget: float, variant: str) -> float | None:
    """Return the share of the mIoU lost by pruning that distillation recovers; None if pruning lost nothing.

    From the means over those seeds that have all three runs: dense, without and with distillation.
    """
    dense, none = scores(rows, 1.0, "dense"), scores(rows, budget, "none")
    distilled = scores(rows, budget, variant)
    seeds = dense.keys() & none.keys() & distilled.keys()
    lost = sum(dense[seed] - none[seed] for seed in seeds)
    return sum(distilled[seed] - none[seed] for seed in seeds) / lost if lost > 0 else None


def difference(rows: Sequence[Row], budget: float, variant: str) -> list[float]:
    """Return the test mIoU minus that without distillation, for each seed."""
    none, distilled = scores(rows, budget, "none"), scores(rows, budget, variant)
    return [distilled[seed] - none[seed] for seed in sorted(none.keys() & distilled.keys())]


def budgets(rows: Sequence[Row]) -> list[float]:
    """Return the shares of MACs, largest first."""
    return sorted({row["budget"] for row in rows if row["variant"] != "dense"}, reverse=True)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table: one row per budget and loss."""
    lines = [
        f"Dense: test mIoU {spread(list(scores(rows, 1.0, 'dense').values()))}.",
        "",
        "| MACs left | distillation | test mIoU | difference to none, same seed | share of the loss recovered |",
        "|--:|:--|--:|--:|--:|",
    ]
    variants = [(budget, variant) for budget in budgets(rows) for variant in NAMES]
    return [*lines, *(line(rows, *key) for key in variants if scores(rows, *key))]


def line(rows: Sequence[Row], budget: float, variant: str) -> str:
    """Return one row of the table."""
    miou = spread(list(scores(rows, budget, variant).values()))
    change, share = "", ""
    if variant != "none":
        change, ratio = spread(difference(rows, budget, variant)), recovered(rows, budget, variant)
        share = "" if ratio is None else f"{100 * ratio:.0f} %"
    return f"| {budget:.0%} | {NAMES[variant]} | {miou} | {change} | {share} |"


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write JSON, picture, and the section ``study`` of ``distillation.md``; without rows, from the stored JSON."""
    files = ReportFiles("distillation", folder)
    content = files.save_runs(rows)
    files.write_section("study", section(content))
    draw(content["runs"], files.figure)


def section(content: dict[str, Any]) -> str:
    """Return the table (Markdown) of the stored numbers."""
    head = (
        f"{content['date']} · torch {content['versions']['torch']} · one thread · "
        "`python -m benchmarks.distillation`. Mean ± sample standard deviation (number of seeds)."
    )
    return "\n".join([head, "", *table(content["runs"]), "", *intervals(content["runs"])])


def intervals(rows: Sequence[Row]) -> list[str]:
    """Return the intervals (Markdown) of the differences to no distillation, and which of them exclude 0."""
    differences = {
        (budget, variant): interval(difference(rows, budget, variant))
        for budget in budgets(rows)
        for variant in NAMES
        if variant != "none"
    }
    lines = ["Difference to none, same seed, with its 95 % interval (Student's t):", ""]
    for budget in budgets(rows):
        cells = [f"{NAMES[name]} {d}" for (at, name), d in differences.items() if at == budget and d.count]
        lines.append(f"- {budget:.0%}: {'; '.join(cells)}.")
    clear = [f"{NAMES[n]} at {at:.0%}" for (at, n), d in differences.items() if d.verdict != "open"]
    return [*lines, "", f"Intervals that exclude 0: {', '.join(clear) or 'none'}."]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw each run as a dot and the mean as a line, one panel per budget."""
    shares = budgets(rows)
    figure, axes = plt.subplots(1, max(len(shares), 1), figsize=(9, 3.4), sharey=True, squeeze=False)
    for axis, budget in zip(axes[0], shares, strict=False):
        draw_budget(axis, rows, budget)
    axes[0][0].set_ylabel("test mIoU")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_budget(axis: Any, rows: Sequence[Row], budget: float) -> None:
    """Draw the panel of one budget."""
    if dense := scores(rows, 1.0, "dense"):
        axis.axhline(statistics.fmean(dense.values()), color="0.6", linestyle="--", label="dense")
    for place, variant in enumerate(NAMES):
        values = list(scores(rows, budget, variant).values())
        axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
        if values:
            axis.hlines(statistics.fmean(values), place - 0.3, place + 0.3, color=f"C{place}")
    axis.set_xticks(range(len(NAMES)), list(NAMES.values()), rotation=20)
    axis.set_title(f"{budget:.0%} of the MACs")
