"""The table and the picture of ``python -m benchmarks.methods``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.pages import mean_spread, replace_between, save_runs
from benchmarks.common.studies import Row

FIGURES = {"test mIoU": "miou", "MACs %": "macs", "params %": "params", "latency %": "latency"}
NAMES = {"macs": "MACs", "latency": "latency"}
Budget = tuple[str, float]  # resource, share


def of(rows: Sequence[Row], budget: Budget, variant: str, figure: str) -> list[float]:
    """One per seed."""
    return [row[figure] for row in rows if (budget_of(row), row["variant"]) == (budget, variant)]


def budget_of(row: Row) -> Budget:
    return row["resource"], row["budget"]


def budgets(rows: Sequence[Row]) -> list[Budget]:
    """MACs before latency, large before small."""
    return sorted(
        {budget_of(row) for row in rows}, key=lambda budget: (list(NAMES).index(budget[0]), -budget[1])
    )


def variants(rows: Sequence[Row], budget: Budget) -> list[str]:
    """The best first."""
    found = list(dict.fromkeys(row["variant"] for row in rows if budget_of(row) == budget))
    return sorted(found, key=lambda variant: -statistics.fmean(of(rows, budget, variant, "miou")))


def name_of(budget: Budget) -> str:
    return f"{budget[1]:.0%} of the {NAMES[budget[0]]}"


def steps_of(rows: Sequence[Row], budget: Budget, variant: str) -> str:
    """Of training, and the fewest and most of candidates."""
    steps, candidates = (of(rows, budget, variant, figure) for figure in ("steps", "candidate_steps"))
    added = " to ".join(str(number) for number in sorted({min(candidates), max(candidates)}) if number)
    return f"{round(statistics.fmean(steps))}{added and f' + {added}'}"


def line(rows: Sequence[Row], budget: Budget, variant: str) -> str:
    values = {name: of(rows, budget, variant, figure) for name, figure in FIGURES.items()}
    cells = [mean_spread(v) if n == "test mIoU" else mean_spread(v, 1, 100) for n, v in values.items()]
    facts = [name_of(budget), variant, str(len(values["MACs %"])), steps_of(rows, budget, variant), *cells]
    return f"| {' | '.join(facts)} |"


def table(rows: Sequence[Row]) -> list[str]:
    head = f"| budget | method | seeds | steps | {' | '.join(FIGURES)} |"
    lines = [line(rows, budget, v) for budget in budgets(rows) for v in variants(rows, budget)]
    return [head, "|:--|:--|--:|--:|" + "--:|" * len(FIGURES), *lines]


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
    pruned = [row for row in rows if row["budget"] < 1]
    shown = budgets(pruned)
    names = sorted({row["variant"] for row in pruned})
    figure, axes = plt.subplots(
        1, max(len(shown), 1), figsize=(13, 4), sharex=True, sharey=True, squeeze=False
    )
    dense = [row["miou"] for row in rows if row["budget"] == 1]
    for axis, budget in zip(axes[0], shown, strict=False):
        if dense:
            axis.axhline(statistics.fmean(dense), color="0.6", linestyle="--", label="dense")
        for number, name in enumerate(names):
            latency, miou = (of(rows, budget, name, figure) for figure in ("latency", "miou"))
            axis.plot([100 * ratio for ratio in latency], miou, "o", color=f"C{number}", label=name)
        axis.set_title(name_of(budget))
        axis.set_xlabel("measured latency, % of dense")
    axes[0][0].set_ylabel("test mIoU")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
