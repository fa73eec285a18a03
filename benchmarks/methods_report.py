"""The table and the picture of ``python -m benchmarks.methods``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.pages import mean_spread, replace_between, save_runs
from benchmarks.studies import Row

FIGURES = {"test mIoU": "miou", "MACs %": "macs", "params %": "params", "latency %": "latency"}


def of(rows: Sequence[Row], budget: float, variant: str, figure: str) -> list[float]:
    """One per seed."""
    return [row[figure] for row in rows if (row["budget"], row["variant"]) == (budget, variant)]


def variants(rows: Sequence[Row], budget: float) -> list[str]:
    """The best first."""
    found = list(dict.fromkeys(row["variant"] for row in rows if row["budget"] == budget))
    return sorted(found, key=lambda variant: -statistics.fmean(of(rows, budget, variant, "miou")))


def table(rows: Sequence[Row]) -> list[str]:
    lines = [f"| budget | method | seeds | {' | '.join(FIGURES)} |", "|--:|:--|--:|" + "--:|" * len(FIGURES)]
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for variant in variants(rows, budget):
            values = {name: of(rows, budget, variant, figure) for name, figure in FIGURES.items()}
            cells = [
                mean_spread(v) if n == "test mIoU" else mean_spread(v, 1, 100) for n, v in values.items()
            ]
            lines.append(f"| {budget:.0%} | {variant} | {len(values['MACs %'])} | {' | '.join(cells)} |")
    return lines


def write(rows: Sequence[Row], docs: Path) -> None:
    """JSON, picture, and the table into ``methods.md``, between its two marks."""
    head = save_runs(rows, docs / "methods.json")
    said = (
        f"{head['date']} · torch {head['versions']['torch']} · one thread · `python -m benchmarks.methods`. "
    )
    said += "Mean ± sample standard deviation over seeds; sizes and latency in per cent of the dense network."
    replace_between(docs / "methods.md", "study", "\n".join([said, "", *table(rows)]))
    draw(rows, docs / "methods.png")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Test mIoU against measured latency, every run a dot, every method a colour."""
    budgets = sorted({row["budget"] for row in rows if row["budget"] < 1}, reverse=True)
    names = sorted({row["variant"] for row in rows if row["budget"] < 1})
    figure, axes = plt.subplots(1, max(len(budgets), 1), figsize=(10, 4), sharey=True, squeeze=False)
    dense = [row["miou"] for row in rows if row["budget"] == 1]
    for axis, budget in zip(axes[0], budgets, strict=False):
        if dense:
            axis.axhline(statistics.fmean(dense), color="0.6", linestyle="--", label="dense")
        for number, name in enumerate(names):
            latency, miou = (of(rows, budget, name, figure) for figure in ("latency", "miou"))
            axis.plot([100 * ratio for ratio in latency], miou, "o", color=f"C{number}", label=name)
        axis.set_title(f"{budget:.0%} of the MACs")
        axis.set_xlabel("measured latency, % of dense")
    axes[0][0].set_ylabel("test mIoU")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
