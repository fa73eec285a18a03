"""Table and picture of ``python -m benchmarks.methods``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.intervals import Interval, interval
from benchmarks.common.pages import RESULTS, ReportFiles, mean_spread
from benchmarks.common.studies import Row

COLUMNS = {"test mIoU": "miou", "MACs %": "macs", "params %": "params", "latency %": "latency"}
NAMES = {"macs": "MACs", "latency": "latency"}
DENSE = "dense"
Budget = tuple[str, float]  # resource, share


def values_of(rows: Sequence[Row], budget: Budget, variant: str, key: str) -> list[float]:
    """Return the values of all seeds."""
    return [row[key] for row in rows if (budget_of(row), row["variant"]) == (budget, variant)]


def budget_of(row: Row) -> Budget:
    return row["resource"], row["budget"]


def budgets(rows: Sequence[Row]) -> list[Budget]:
    """Return the budgets: MACs before latency, large before small."""
    return sorted(
        {budget_of(row) for row in rows}, key=lambda budget: (list(NAMES).index(budget[0]), -budget[1])
    )


def variants(rows: Sequence[Row], budget: Budget) -> list[str]:
    """Return the methods, the one with the highest mean mIoU first."""
    names = list(dict.fromkeys(row["variant"] for row in rows if budget_of(row) == budget))
    return sorted(names, key=lambda variant: -statistics.fmean(values_of(rows, budget, variant, "miou")))


def name_of(budget: Budget) -> str:
    return f"{budget[1]:.0%} of the {NAMES[budget[0]]}"


def steps_of(rows: Sequence[Row], budget: Budget, variant: str) -> str:
    """Format the mean number of training steps, and the range of additional steps of candidates."""
    steps, candidates = (values_of(rows, budget, variant, key) for key in ("steps", "candidate_steps"))
    added = " to ".join(str(number) for number in sorted({min(candidates), max(candidates)}) if number)
    return f"{round(statistics.fmean(steps))}{added and f' + {added}'}"


def line(rows: Sequence[Row], budget: Budget, variant: str) -> str:
    """Return one row of the table."""
    values = {name: values_of(rows, budget, variant, key) for name, key in COLUMNS.items()}
    cells = [mean_spread(v) if n == "test mIoU" else mean_spread(v, 1, 100) for n, v in values.items()]
    seeds = str(len(values["MACs %"]))
    return f"| {' | '.join([name_of(budget), variant, seeds, steps_of(rows, budget, variant), *cells])} |"


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table: one row per budget and method."""
    head = f"| budget | method | seeds | steps | {' | '.join(COLUMNS)} |"
    lines = [line(rows, budget, v) for budget in budgets(rows) for v in variants(rows, budget)]
    return [head, "|:--|:--|--:|--:|" + "--:|" * len(COLUMNS), *lines]


def write(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Write JSON, picture, and the section ``study`` of ``methods.md``; without rows, from the stored JSON."""
    files = ReportFiles("methods", folder)
    content = files.save_runs(rows)
    files.write_section("study", section(content))
    draw(content["runs"], files.figure)


def section(content: dict[str, Any]) -> str:
    """Return the table (Markdown) of the stored numbers."""
    head = (
        f"{content['date']} · torch {content['versions']['torch']} · one thread · `python -m benchmarks.methods`. "
        "Mean ± sample standard deviation over seeds; sizes and latency in per cent of the dense network."
    )
    return "\n".join([head, "", *table(content["runs"]), "", *intervals(content["runs"])])


def intervals(rows: Sequence[Row]) -> list[str]:
    """Return the intervals (Markdown) of the differences from the dense network."""
    lines = [
        "Test mIoU less that of the dense network of the same seed, with its 95 % interval (Student's t):",
        "",
    ]
    for budget in budgets([row for row in rows if row["variant"] != DENSE]):
        cells = (f"{name} {from_dense(rows, budget, name)}" for name in variants(rows, budget))
        lines.append(f"- {name_of(budget)}: {'; '.join(cells)}.")
    return lines


def from_dense(rows: Sequence[Row], budget: Budget, variant: str) -> Interval:
    """Return the interval of the differences from the dense network of the same seed."""
    dense = {row["seed"]: row["miou"] for row in rows if row["variant"] == DENSE}
    ours = {row["seed"]: row["miou"] for row in rows if (budget_of(row), row["variant"]) == (budget, variant)}
    return interval([ours[seed] - dense[seed] for seed in ours if seed in dense])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw test mIoU over measured latency, one panel per budget: each run a dot, each method a colour."""
    pruned = [row for row in rows if row["budget"] < 1]
    panels = budgets(pruned)
    figure, axes = plt.subplots(
        1, max(len(panels), 1), figsize=(13, 4), sharex=True, sharey=True, squeeze=False
    )
    for axis, budget in zip(axes[0], panels, strict=False):
        draw_budget(axis, rows, budget, sorted({row["variant"] for row in pruned}))
    axes[0][0].set_ylabel("test mIoU")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_budget(axis: Any, rows: Sequence[Row], budget: Budget, names: Sequence[str]) -> None:
    """Draw the panel of one budget."""
    dense = [row["miou"] for row in rows if row["budget"] == 1]
    if dense:
        axis.axhline(statistics.fmean(dense), color="0.6", linestyle="--", label="dense")
    for number, name in enumerate(names):
        latency, miou = (values_of(rows, budget, name, key) for key in ("latency", "miou"))
        axis.plot([100 * ratio for ratio in latency], miou, "o", color=f"C{number}", label=name)
    axis.set_title(name_of(budget))
    axis.set_xlabel("measured latency, % of dense")
