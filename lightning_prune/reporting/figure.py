"""One picture of a run: channels per layer before and after, beside mIoU and MACs over the epochs (level 5).

``python -m lightning_prune.reporting.figure RUN [BASELINE]`` draws it anew from the run's ``summary.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_prune.reporting.comparison import comparison, only, share, threads_or_device
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.run_folder import REPORT, Summary
from lightning_prune.utils.formatting import si
from lightning_prune.utils.tables import Table, show

__all__ = ["draw_report", "figure", "show_run"]

PALE, STRONG, ACCENT, INK = "#cfd8dc", "#1565c0", "#e65100", "#37474f"
SMALL: dict[str, Any] = {"fontsize": 6, "color": INK, "va": "center"}
ROW = 0.17  # inches per layer
MOST_LABELS = 70


def draw_report(summary: Summary, path: Path, baseline: Summary | None = None) -> None:
    """Write the picture.

    Args:
        summary: of the run.
        path: of the PNG.
        baseline: of a dense run of the same data, whose curve and score are drawn as well.
    """
    figure(summary, baseline).savefig(path, dpi=130)


def figure(summary: Summary, baseline: Summary | None = None) -> Figure:
    """The picture: bars on the left, curves on the right."""
    height = min(12.0, max(5.2, 1.6 + ROW * len(summary.widths)))
    whole = Figure(figsize=(12, height), layout="constrained")
    whole.suptitle(headline(summary, baseline), color=INK, fontsize=12)
    grid = whole.add_gridspec(2, 2, width_ratios=(1, 1.15))
    draw_widths(whole.add_subplot(grid[:, 0]), summary.widths)
    top = whole.add_subplot(grid[0, 1])
    draw_miou(top, summary, baseline)
    draw_macs(whole.add_subplot(grid[1, 1], sharex=top), summary)
    return whole


def headline(summary: Summary, baseline: Summary | None = None) -> str:
    """What came out, in one line."""
    score = f"test mIoU {summary.test.get('miou', float('nan')):.3f}"
    if baseline is not None:
        score += f" (dense {baseline.test.get('miou', float('nan')):.3f})"
    if summary.dense is None or summary.final is None:
        return score
    if not summary.pruned:
        macs, params = si(summary.final.macs, 4, " "), si(summary.final.params, 4, " ")
        return f"{macs} MACs, {params} parameters · {score}"
    macs = share(summary.final.macs, summary.dense.macs)
    params = share(summary.final.params, summary.dense.params)
    return f"{macs} of the MACs and {params} of the parameters left · {score}"


def draw_widths(axes: Axes, widths: Mapping[str, tuple[int, int]]) -> None:
    """One bar per layer, top to bottom as the data flows: pale before, strong after."""
    rows = range(len(widths))
    axes.barh(rows, [before for before, _ in widths.values()], color=PALE, height=0.8, label="dense")
    axes.barh(rows, [after for _, after in widths.values()], color=STRONG, height=0.5, label="pruned")
    step = -(-len(widths) // MOST_LABELS) or 1
    axes.set_yticks(rows[::step], list(widths)[::step])
    for row, (before, after) in list(enumerate(widths.values()))[::step]:
        axes.annotate(f"{after}/{before}", (before, row), (3, 0), textcoords="offset points", **SMALL)
    axes.margins(x=0.12)
    axes.set_ylim(len(widths) - 0.4, -0.6)
    axes.set_title("channels per layer", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    _tidy(axes, "x")
    axes.tick_params(axis="y", labelsize=7, length=0)


def draw_miou(axes: Axes, summary: Summary, baseline: Summary | None = None) -> None:
    """Validation mIoU at the end of each epoch, measured before that epoch's cut."""
    _mark_cuts(axes, summary)
    if baseline is not None:
        axes.plot(*curve(baseline, "val/miou"), color="#90a4ae", lw=1.5, label="dense")
    label = "pruned" if summary.pruned else "dense"
    axes.plot(*curve(summary, "val/miou"), color=STRONG, lw=1.8, marker="o", ms=3, label=label)
    axes.set_title("validation mIoU (before the cut of its epoch)", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.tick_params(labelbottom=False)
    _tidy(axes, "both")


def draw_macs(axes: Axes, summary: Summary) -> None:
    """The share of the dense MACs that each epoch was trained with."""
    _mark_cuts(axes, summary)
    epochs, left = macs_curve(summary)
    axes.step(epochs, left, where="post", color=ACCENT, lw=1.8)
    axes.set_title("MACs left of the dense network", loc="left", fontsize=10, color=INK)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs trained; dotted: cuts", fontsize=9, color=INK)
    _tidy(axes, "both")


def curve(summary: Summary, metric: str) -> tuple[list[float], list[float]]:
    """Epochs trained, and the metric after each of them."""
    rows = [row for row in summary.curves if metric in row]
    return [row["epoch"] + 1 for row in rows], [row[metric] for row in rows]


def macs_curve(summary: Summary) -> tuple[list[float], list[float]]:
    """Epochs trained, and the share of the MACs from then on."""
    epochs, left = curve(summary, "prune/macs_share")
    if not epochs:
        return [0, summary.epochs], [1.0, 1.0]
    return [0, *epochs], [1.0, *left]


def _mark_cuts(axes: Axes, summary: Summary) -> None:
    for cut in summary.cuts:
        axes.axvline(cut["epoch"] + 1, color=ACCENT, lw=0.8, ls=":", alpha=0.7)


def _tidy(axes: Axes, grid: Literal["both", "x"]) -> None:
    axes.grid(axis=grid, color="#eceff1", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def show_run(summary: Summary, folder: Path, prefix: str = "", whole: bool = True) -> None:
    """Print what came out of a run and where it lies: a table, or one line."""
    if whole and summary.dense and summary.final:
        show(_table(summary, summary.dense, summary.final))
    print(f"{prefix}{headline(summary)} · {folder / REPORT}", flush=True)


def _table(summary: Summary, dense: Sizes, final: Sizes) -> Table:
    where = threads_or_device(summary.threads, summary.device)
    if summary.pruned:
        return comparison(dense, final, {}, summary.test, where)
    return only(final, summary.test, where)


def main(arguments: Sequence[str] = ()) -> None:
    """Draw the picture of a run again, with a baseline if there is one."""
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("usage: python -m lightning_prune.reporting.figure RUN [BASELINE]")
    run, *others = map(Path, arguments)
    draw_report(Summary.load(run), run / REPORT, Summary.load(others[0]) if others else None)
    print(run / REPORT)


if __name__ == "__main__":
    main(sys.argv[1:])
