"""The tables and the picture of ``python -m benchmarks.distillation``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.pages import mean_spread, replace_between, save_runs

NAMES = {
    "none": "no distillation",
    "hinton": "Hinton",
    "attention": "attention",
    "fsp": "FSP",
    "all": "all three",
}
Row = dict[str, Any]


def of(rows: Sequence[Row], budget: float, variant: str) -> dict[int, float]:
    """Seed -> test mIoU."""
    return {r["seed"]: r["test_miou"] for r in rows if (r["budget"], r["variant"]) == (budget, variant)}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and sample standard deviation."""
    return f"{mean_spread(values, digits)} ({len(values)})" if values else "-"


def won_back(rows: Sequence[Row], budget: float, variant: str) -> float | None:
    """Share of what pruning lost, from the means over the seeds that have all three runs."""
    dense, none, found = of(rows, 1.0, "dense"), of(rows, budget, "none"), of(rows, budget, variant)
    seeds = dense.keys() & none.keys() & found.keys()
    lost = sum(dense[seed] - none[seed] for seed in seeds)
    return sum(found[seed] - none[seed] for seed in seeds) / lost if lost > 0 else None


def difference(rows: Sequence[Row], budget: float, variant: str) -> list[float]:
    """Test mIoU against no distillation, seed by seed."""
    none, found = of(rows, budget, "none"), of(rows, budget, variant)
    return [found[seed] - none[seed] for seed in sorted(none.keys() & found.keys())]


def table(rows: Sequence[Row]) -> list[str]:
    budgets = sorted({r["budget"] for r in rows if r["variant"] != "dense"}, reverse=True)
    lines = [
        f"Dense: test mIoU {spread(list(of(rows, 1.0, 'dense').values()))}.",
        "",
        "| MACs left | distillation | test mIoU | against none, same seed | of the loss won back |",
        "|--:|:--|--:|--:|--:|",
    ]
    for budget in budgets:
        for variant, name in NAMES.items():
            if values := of(rows, budget, variant):
                back = None if variant == "none" else won_back(rows, budget, variant)
                against = "" if variant == "none" else spread(difference(rows, budget, variant))
                share = "" if back is None else f"{100 * back:.0f} %"
                lines.append(
                    f"| {budget:.0%} | {name} | {spread(list(values.values()))} | {against} | {share} |"
                )
    return lines


def write(rows: list[Row], docs: Path) -> None:
    """JSON, picture, and the table into ``distillation.md``, between its two marks."""
    head = save_runs(rows, docs / "distillation.json")
    said = f"{head['date']} · torch {head['versions']['torch']} · one thread · `python -m benchmarks.distillation`. "
    said += "Mean ± sample standard deviation (number of seeds)."
    replace_between(docs / "distillation.md", "study", "\n".join([said, "", *table(rows)]))
    draw(rows, docs / "distillation.png")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Every run as a dot, their mean as a line, for each budget."""
    budgets = sorted({r["budget"] for r in rows if r["variant"] != "dense"}, reverse=True)
    figure, axes = plt.subplots(1, max(len(budgets), 1), figsize=(9, 3.4), sharey=True, squeeze=False)
    dense = list(of(rows, 1.0, "dense").values())
    for axis, budget in zip(axes[0], budgets, strict=False):
        if dense:
            axis.axhline(statistics.fmean(dense), color="0.6", linestyle="--", label="dense")
        for place, variant in enumerate(NAMES):
            values = list(of(rows, budget, variant).values())
            axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            if values:
                axis.hlines(statistics.fmean(values), place - 0.3, place + 0.3, color=f"C{place}")
        axis.set_xticks(range(len(NAMES)), list(NAMES.values()), rotation=20)
        axis.set_title(f"{budget:.0%} of the MACs")
    axes[0][0].set_ylabel("test mIoU")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
