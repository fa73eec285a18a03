"""Figure of a run: channels per layer before and after pruning, score and MACs over the epochs.

``python -m lightning_prune.reporting.figure RUN [BASELINE]`` draws it again from the run's ``summary.json``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_prune.reporting.comparison import comparison, share, single, threads_or_device
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.run_folder import PAGE, REPORT, Summary
from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.formatting import si
from lightning_prune.utils.metrics import SCORE_LABELS, score_name
from lightning_prune.utils.tables import Table, show
from lightning_prune.utils.terminal import fitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_report", "figure", "show_run", "write_png"]

PALE, STRONG, ACCENT, INK = "#cfd8dc", "#1565c0", "#e65100", "#37474f"
SMALL: dict[str, Any] = {"fontsize": 6, "color": INK, "va": "center"}
ROW = 0.17  # inches per layer
MOST_LABELS = 70  # of layers; with more layers only every second, third, ... gets one


def draw_report(summary: Summary, path: Path, baseline: Summary | None = None) -> None:
    """Draw the figure of a run and write it to a file.

    Args:
        summary: results of the run.
        path: path of the PNG file.
        baseline: results of a dense run on the same data, whose curve and score are added.
    """
    write_png(figure(summary, baseline), path)


def write_png(picture: Figure, path: Path) -> None:
    """Write a figure to a PNG file; if that fails, ``path`` keeps its content."""
    with atomic_write(path) as temporary:
        picture.savefig(temporary, dpi=130, format="png")


def figure(summary: Summary, baseline: Summary | None = None) -> Figure:
    """Return the figure: bars on the left, curves on the right."""
    from matplotlib.figure import Figure  # takes a second; a run without a picture needs none

    height = min(12.0, max(5.2, 1.6 + ROW * len(summary.widths)))
    page = Figure(figsize=(12, height), layout="constrained")
    page.suptitle(headline(summary, baseline), color=INK, fontsize=12)
    grid = page.add_gridspec(2, 2, width_ratios=(1, 1.15))
    draw_widths(page.add_subplot(grid[:, 0]), summary.widths)
    top = page.add_subplot(grid[0, 1])
    draw_score(top, summary, baseline)
    draw_macs(page.add_subplot(grid[1, 1], sharex=top), summary)
    return page


def headline(summary: Summary, baseline: Summary | None = None) -> str:
    """Return the results of a run in one line: what is left, and the score, on the test set if there is one."""
    score = _score(summary, baseline)
    if summary.dense is None or summary.final is None:
        return score
    if not summary.pruned:
        macs, params = si(summary.final.macs, 4, " "), si(summary.final.params, 4, " ")
        return f"{macs} MACs, {params} parameters · {score}"
    macs = share(summary.final.macs, summary.dense.macs)
    params = share(summary.final.params, summary.dense.params)
    return f"{macs} of the MACs and {params} of the parameters left · {score}"


def _score(summary: Summary, baseline: Summary | None) -> str:
    """Return the main score with its set, and that of the dense run on the same set."""
    stage, scores = summary.scores
    name = score_name(scores)
    if name not in scores:
        return "not tested"
    text = f"{stage} {SCORE_LABELS[name]} {scores[name]:.3f}"
    dense = {} if baseline is None else {"val": baseline.val, "test": baseline.test}[stage]
    return f"{text} (dense {dense[name]:.3f})" if name in dense else text


def draw_widths(axes: Axes, widths: Mapping[str, tuple[int, int]]) -> None:
    """Draw one bar per layer in the order of the forward, from the top: pale before pruning, strong after."""
    rows = range(len(widths))
    axes.barh(rows, [before for before, _ in widths.values()], color=PALE, height=0.8, label="dense")
    axes.barh(rows, [after for _, after in widths.values()], color=STRONG, height=0.5, label="pruned")
    step = max(math.ceil(len(widths) / MOST_LABELS), 1)
    axes.set_yticks(rows[::step], list(widths)[::step])
    for row, (before, after) in list(enumerate(widths.values()))[::step]:
        axes.annotate(f"{after}/{before}", (before, row), (3, 0), textcoords="offset points", **SMALL)
    axes.margins(x=0.12)
    axes.set_ylim(len(widths) - 0.4, -0.6)
    _set_title(axes, "channels per layer")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    _style(axes, "x")
    axes.tick_params(axis="y", labelsize=7, length=0)


def draw_score(axes: Axes, summary: Summary, baseline: Summary | None = None) -> None:
    """Draw the validation score at the end of each epoch, measured before the cut of the epoch."""
    name = _drawn_score(summary)
    _mark_cuts(axes, summary)
    if baseline is not None:
        axes.plot(*curve(baseline, f"val/{name}"), color="#90a4ae", lw=1.5, label="dense")
    label = "pruned" if summary.pruned else "dense"
    axes.plot(*curve(summary, f"val/{name}"), color=STRONG, lw=1.8, marker="o", ms=3, label=label)
    _set_title(axes, f"validation {SCORE_LABELS[name]} (before the cut of its epoch)")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.tick_params(labelbottom=False)
    _style(axes, "both")


def _drawn_score(summary: Summary) -> str:
    """Return the main score; of a run that ended early, the one in its curves."""
    return score_name([*summary.scores[1], *(name for row in summary.curves for name in row)])


def draw_macs(axes: Axes, summary: Summary) -> None:
    """Draw the share of the dense network's MACs in each epoch."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    _mark_cuts(axes, summary)
    epochs, shares = macs_curve(summary)
    axes.step(epochs, shares, where="post", color=ACCENT, lw=1.8)
    _set_title(axes, "MACs left of the dense network")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epochs trained; dotted: cuts", fontsize=9, color=INK)
    _style(axes, "both")


def curve(summary: Summary, metric: str) -> tuple[list[float], list[float]]:
    """Return numbers of trained epochs, and the values of the metric after them."""
    rows = [row for row in summary.curves if metric in row]
    return [row["epoch"] + 1 for row in rows], [row[metric] for row in rows]


def macs_curve(summary: Summary) -> tuple[list[float], list[float]]:
    """Return numbers of trained epochs, and the share of the MACs that is left after them."""
    epochs, shares = curve(summary, "prune/macs_share")
    if not epochs:
        return [0, summary.epochs], [1.0, 1.0]
    return [0, *epochs], [1.0, *shares]


def _mark_cuts(axes: Axes, summary: Summary) -> None:
    for cut in summary.cuts:
        axes.axvline(cut["epoch"] + 1, color=ACCENT, lw=0.8, ls=":", alpha=0.7)


def _set_title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)


def _style(axes: Axes, grid: Literal["both", "x"]) -> None:
    axes.grid(axis=grid, color="#eceff1", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def show_run(summary: Summary, folder: Path, prefix: str = "", whole: bool = True) -> None:
    """Print the results of a run: a table unless ``whole`` is false, and a line with the path of its page or figure.

    Args:
        summary: results of the run.
        folder: of the run, or the path of its page or figure.
        prefix: before the line.
        whole: whether to print the table.
    """
    page = folder / (PAGE if (folder / PAGE).is_file() else REPORT) if folder.is_dir() else folder
    if whole and summary.dense and summary.final:
        show(_table(summary, summary.dense, summary.final))
    print(fitted(f"{prefix}{headline(summary)} · {page}", " " * len(prefix)), flush=True)


def _table(summary: Summary, dense: Sizes, final: Sizes) -> Table:
    where, (stage, scores) = threads_or_device(summary.threads, summary.device), summary.scores
    if summary.pruned:
        return comparison(dense, final, {}, scores, where, stage)
    return single(final, scores, where, stage)


def main(arguments: Sequence[str] = ()) -> None:
    """Draw the figure of a run again from its summary, with a baseline if one is named."""
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("usage: python -m lightning_prune.reporting.figure RUN [BASELINE]")
    run, *others = map(Path, arguments)
    draw_report(Summary.load(run), run / REPORT, Summary.load(others[0]) if others else None)
    print(run / REPORT)


if __name__ == "__main__":
    main(sys.argv[1:])
