"""The page of ``python -m benchmarks.depth``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.common.intervals import interval
from benchmarks.common.pages import ReportFiles
from benchmarks.common.studies import Row
from benchmarks.depth.curves import (
    BUDGETS,
    EXECUTIONS,
    METHODS,
    TASKS,
    Difference,
    chosen,
    differences,
    means,
)
from benchmarks.depth.number_report import section
from benchmarks.quality.summary import collapsed
from benchmarks.quality.tasks import SIZES

__all__ = ["write"]

COLOURS = dict(zip(METHODS, ("#1565c0", "#e65100"), strict=True))
SCORES = {"fashion": "accuracy", "brain": "mean IoU"}
VERDICTS = {
    "above": "depth and width is better",
    "below": "depth and width is worse",
    "open": "no difference is shown",
}
INTRODUCTION = """# Depth and width against width alone

{date} · {versions} · {machine}. Made by `python -m benchmarks.depth`, which says the protocol, fixed before the runs.

Trained networks of the [quality benchmark](quality.md) are cut once to 80, 65, 50, 35 and 25 % of their latency, with
channels alone, or with whole residual blocks besides, whose number `DepthSettings(max_depth_ratio=1)` finds itself.
Criterion, images, limits, repair, and the training that follows (steps: {steps}) are the same.
Latency is measured in turns with the dense network: one image, one thread, processor time, the median of three
measurements.

![Score against measured latency](figures/depth.png)

Thin lines: single seeds; thick: means over the seeds of each budget. Dotted: the score of the dense network, and
where width alone ends.

## At equal measured latency

Test score of depth and width minus that of width alone, interpolated between the measured cuts of each seed and
averaged over the latencies that both methods reach; paired by seed, with 95 % intervals (Student's t). *Fastest*: at
the smallest latency that both reach.
"""
NOTE = """
After training the U-Net loses next to nothing by any cut down to a third of its latency, so that there is little that
a better choice could win; before training it shows. So the aim, better on two networks and two tasks, is met before
training, and after it for ResNet-20 alone. The networks are small: calls of operators take much of their time, above
all in PyTorch, and only blocks that are gone save these. Of the U-Net in PyTorch one seed was run.
"""


def write(rows: Sequence[Row], docs: Path) -> None:
    """Write page, numbers and picture; from the stored numbers if there are no rows."""
    files = ReportFiles("depth", docs)
    data = files.save_runs(rows)
    files.write_page(page(data))
    _draw(_of_the_study(data["runs"]), files.figure)


def _of_the_study(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of networks of which all cuts are done, without those of ``benchmarks.depth.numbers``."""
    cuts = [row for row in rows if "norms anew" not in row]
    done = Counter(map(_network, cuts))
    return [row for row in cuts if done[_network(row)] == len(METHODS) * len(BUDGETS)]


def _network(row: Row) -> tuple[str, str, int]:
    return row["execution"], row["task"], row["seed"]


def page(data: dict[str, Any]) -> str:
    """Return the text of the page."""
    rows = _of_the_study(data["runs"])
    numbers = [row for row in data["runs"] if "norms anew" in row]
    steps = ", ".join(f"{SIZES[name]['study'].stage_steps[1]} on {name}" for name in TASKS)
    head = INTRODUCTION.format(
        date=data["date"],
        versions=f"torch {data['versions']['torch']}",
        machine=data["machine"],
        steps=steps,
    )
    lines = [
        *head.splitlines(),
        "",
        *_compared(rows),
        "",
        *_verdicts(rows),
        *NOTE.splitlines(),
        "",
        *section(numbers),
        *_cuts(rows),
    ]
    return "\n".join(lines) + "\n"


def _compared(rows: Sequence[Row]) -> Iterator[str]:
    yield "| executed by | network | seeds | latency | before training | after training | fastest, after training |"
    yield "|:--|:--|--:|--:|--:|--:|--:|"
    for execution, label in EXECUTIONS.items():
        for task, name in TASKS.items():
            found = [differences(rows, execution, task, when) for when in ("cut", "trained")]
            if found[0]:
                yield f"| {label} | {name} | {len(found[0])} | {_range(found[0])} | {_cells(*found)} |"
        both = [_together(rows, execution, when) for when in ("cut", "trained")]
        if len(both[0]) > 1:
            yield f"| {label} | both, by seed | {len(both[0])} |  | {_cells(*both)} |"


def _range(found: dict[int, Difference]) -> str:
    low, high = fmean(each.low for each in found.values()), fmean(each.high for each in found.values())
    return f"{low:.0%} to {high:.0%}"


def _cells(cut: dict[int, Difference], trained: dict[int, Difference]) -> str:
    values = ([each.mean for each in cut.values()], [each.mean for each in trained.values()])
    fastest = [each.fastest for each in trained.values()]
    return " | ".join(str(interval(each)) for each in (*values, fastest))


def _together(rows: Sequence[Row], execution: str, when: str) -> dict[int, Difference]:
    """Return the mean over both networks for each seed that has both."""
    found = [differences(rows, execution, task, when) for task in TASKS]
    seeds = sorted(set.intersection(*(set(each) for each in found)))
    return {
        seed: Difference(
            *(
                fmean(getattr(each[seed], field) for each in found)
                for field in ("low", "high", "mean", "fastest")
            )
        )
        for seed in seeds
    }


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Say what is shown and what is not, and where width alone ends."""
    for execution, label in EXECUTIONS.items():
        for task, name in TASKS.items():
            trained = interval([each.mean for each in differences(rows, execution, task, "trained").values()])
            if trained.count:
                verdict = VERDICTS[trained.verdict] if trained.count > 1 else "one seed proves nothing"
                yield f"- {name}, {label}: after training {verdict}. {_end(rows, execution, task)}"


def _end(rows: Sequence[Row], execution: str, task: str) -> str:
    """Return how fast each method gets."""
    ends = {}
    for method in METHODS:
        cuts = chosen(rows, execution=execution, task=task, method=method)
        seeds = {row["seed"] for row in cuts}
        ends[method] = fmean(min(row["latency"] for row in cuts if row["seed"] == seed) for seed in seeds)
    missed = chosen(rows, execution=execution, task=task, method=METHODS[0], reached=False)
    if not missed:
        return f"Both reach all budgets; fastest: {ends[METHODS[0]]:.0%} and {ends[METHODS[1]]:.0%} of the latency."
    return f"Width alone ends at {ends[METHODS[0]]:.0%} of the latency, depth and width at {ends[METHODS[1]]:.0%}."


def _cuts(rows: Sequence[Row]) -> Iterator[str]:
    """Return a table of all cuts for each network."""
    for execution, label in EXECUTIONS.items():
        for task, name in TASKS.items():
            cuts = chosen(rows, execution=execution, task=task)
            if not cuts:
                continue
            yield from ("", f"## {name}, {label}", "")
            dense = fmean(row["dense"]["value"] for row in cuts)
            time = fmean(row["dense_milliseconds"] for row in cuts)
            seeds = len({row["seed"] for row in cuts})
            yield (
                f"{f'Means over {seeds} seeds' if seeds > 1 else 'One seed'}; {SCORES[task]} on the test set, dense "
                f"{dense:.3f} in {time:.3g} ms. *c*: runs that lost a class, or half of the accuracy. *Limit*: a "
                "budget out of reach, answered by the smallest network."
            )
            yield from (
                "",
                "| budget | method | latency | ms | MACs | blocks gone | before training | trained |",
            )
            yield "|--:|:--|--:|--:|--:|--:|--:|--:|"
            for budget in BUDGETS:
                for method in METHODS:
                    if here := chosen(cuts, budget=budget, method=method):
                        yield _row(here, budget, method, task)


def _row(rows: Sequence[Row], budget: float, method: str, task: str) -> str:
    share, macs = fmean(row["latency"] for row in rows), fmean(row["macs"] for row in rows)
    time = fmean(row["latency"] * row["dense_milliseconds"] for row in rows)
    gone = sorted(len(row["blocks"]) for row in rows)
    blocks = str(gone[0]) if gone[0] == gone[-1] else f"{gone[0]} to {gone[-1]}"
    limit = "" if all(row["reached"] for row in rows) else " (limit)"
    lost = sum(collapsed(task, row["trained"], row["dense"]) for row in rows)
    scores = [f"{fmean(row[when]['value'] for row in rows):.3f}" for when in ("cut", "trained")]
    cells = (f"{budget:.0%}", method, f"{share:.1%}{limit}", f"{time:.3f}", f"{macs:.1%}", blocks, *scores)
    return f"| {' | '.join(cells)}{f' c{lost}' if lost else ''} |"


def _draw(rows: Sequence[Row], path: Path) -> None:
    shown = [(e, t) for e in EXECUTIONS for t in TASKS if chosen(rows, execution=e, task=t)]
    height = (len(shown) + 1) // 2
    figure, axes = plt.subplots(height, 2, figsize=(10.4, 3.7 * height), squeeze=False)
    for axis, (execution, task) in zip(axes.flat, shown, strict=False):
        _panel(axis, rows, execution, task)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    axes[0][0].legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _panel(axis: Any, rows: Sequence[Row], execution: str, task: str) -> None:
    cuts = chosen(rows, execution=execution, task=task)
    for method, colour in COLOURS.items():
        for seed in sorted({row["seed"] for row in cuts}):
            points = sorted(
                (row["latency"] * row["dense_milliseconds"], row["trained"]["value"])
                for row in chosen(cuts, seed=seed, method=method)
            )
            if points:
                axis.plot(*zip(*points, strict=True), "-", color=colour, alpha=0.3, linewidth=0.9)
        thick = sorted(means(rows, execution, task, method, "trained"))
        axis.plot(*zip(*thick, strict=True), "o-", color=colour, linewidth=2, markersize=5, label=method)
    end = min(time for time, _ in means(rows, execution, task, METHODS[0], "trained"))
    axis.axvline(end, color=COLOURS[METHODS[0]], linestyle=":", linewidth=1)
    axis.axhline(fmean(row["dense"]["value"] for row in cuts), color="0.4", linestyle=":", linewidth=1)
    dense = fmean(row["dense_milliseconds"] for row in cuts)
    axis.set(
        title=f"{TASKS[task]} · {EXECUTIONS[execution]}",
        xlabel=f"milliseconds per image (dense: {dense:.3g})",
    )
    axis.set(ylabel=f"{SCORES[task]} after training")
    axis.grid(alpha=0.25)
