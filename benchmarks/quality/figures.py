"""Pictures of the study, as SVG whose bytes depend on the numbers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.quality.plan import DEFAULT, LABELS, OMEGAS, STAGES, THIN
from benchmarks.quality.summary import Results

__all__ = ["draw_omega", "draw_shares"]

SHOWN = ((DEFAULT, True), ("uniform L2", True), ("LAMP", True), ("random", True), (THIN, False))
FAMILIES = {"IPAD": "published terms", "IPAD energy": "terms of one scale"}


def draw_shares(results: Results, path: Path) -> None:
    """Draw the median score over the share of the MACs, a panel for each task; no repair is dotted."""
    figure, axes = panels(results)
    for axis, task in zip(axes, results.tasks, strict=False):
        for number, (method, repair) in enumerate(SHOWN):
            _line(axis, results, task, method, repair, number)
            if repair:
                _line(axis, results, task, method, False, number)
        axis.axhline(results.dense_median(task), color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(STAGES, [f"{share:.0%}" for share in STAGES])
        axis.minorticks_off()
        axis.invert_xaxis()
        axis.set_xlabel("MACs left (grey: dense; dotted: not repaired)")
    _save(figure, axes, path)


def _line(axis: Any, results: Results, task: str, method: str, repair: bool, number: int) -> None:
    """Draw the line of one method."""
    medians = [results.median((task, method, repair, share)) for share in STAGES]
    whole = repair or method == THIN
    style = {"marker": "o", "label": method} if whole else {"linestyle": ":", "linewidth": 1}
    axis.plot(STAGES, medians, color=f"C{number}", markersize=3, **style)


def draw_omega(results: Results, path: Path) -> None:
    """Draw the median score at 26 % over omega, repaired and not, with random as a horizontal line."""
    figure, axes = panels(results)
    for axis, task in zip(axes, results.tasks, strict=False):
        for number, (family, label) in enumerate(FAMILIES.items()):
            for repair in (True, False):
                keys = [(task, f"{family}, omega {omega:g}", repair, 0.26) for omega in OMEGAS]
                medians = [results.median(key) for key in keys]
                style = {"marker": "o", "label": label} if repair else {"linestyle": ":"}
                axis.plot(OMEGAS, medians, color=f"C{number}", markersize=3, **style)
        for repair, style_name in ((True, "--"), (False, ":")):
            level = results.median((task, "random", repair, 0.26))
            axis.axhline(level, color="0.5", linestyle=style_name, linewidth=0.8)
        axis.set_xticks(OMEGAS)
        axis.set_xlabel("omega (dotted: not repaired; grey: random)")
    _save(figure, axes, path)


def panels(results: Results) -> tuple[Any, list[Any]]:
    """Return a figure with a panel for each task."""
    figure, axes = plt.subplots(1, max(1, len(results.tasks)), figsize=(11, 3.6), squeeze=False)
    for axis, task in zip(axes[0], results.tasks, strict=False):
        axis.set_title(LABELS[task], fontsize=9)
    return figure, list(axes[0])


def _save(figure: Any, axes: list[Any], path: Path) -> None:
    """Write a figure; the same numbers give the same bytes."""
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
