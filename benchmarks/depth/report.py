"""The page of ``python -m benchmarks.depth``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t as student

from benchmarks.common.pages import ReportFiles
from benchmarks.common.studies import Row

__all__ = ["write"]

POINTS = 9  # latencies at which two curves are compared, between the ends that both have
COLOURS = {"width": "#1565c0", "depth and width": "#e65100"}


def write(rows: Sequence[Row], docs: Path) -> None:
    """Write page, numbers and picture; from the stored numbers if there are no rows."""
    files = ReportFiles("depth", docs)
    data = files.save_runs(rows)
    files.write_page(page(data))
    _draw(data["runs"], files.figure)


def differences(rows: Sequence[Row], network: str) -> dict[int, float]:
    """Return, for each seed, the mean difference of the scores at equal latency: depth and width minus width alone.

    Each method's scores are interpolated between its measured latencies; nothing is extrapolated.
    """
    found = {}
    for seed in sorted({row["seed"] for row in rows if row["network"] == network}):
        curves = [_curve(rows, network, seed, method) for method in ("width", "depth and width")]
        if any(len(times) < 3 for times, _ in curves):
            continue
        low, high = max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves)
        if low < high:
            at = np.linspace(low, high, POINTS)
            width, both = (np.interp(at, *curve) for curve in curves)
            found[seed] = float((both - width).mean())
    return found


def _curve(rows: Sequence[Row], network: str, seed: int, method: str) -> tuple[list[float], list[float]]:
    """Return the measured latencies, ascending, and the scores; the dense network ends each curve."""
    chosen = [r for r in rows if (r["network"], r["seed"], r["method"]) == (network, seed, method)]
    points = sorted({(r["latency"], r["score"]) for r in chosen} | {(1.0, r["dense"]) for r in chosen})
    return [time for time, _ in points], [score for _, score in points]


def page(data: dict[str, Any]) -> str:
    """Return the text of the page."""
    rows = data["runs"]
    lines = [
        "# Depth and width against width alone",
        "",
        f"Written by `python -m benchmarks.depth`, {data['date']}. Dense networks are cut in one shot to 70, 50, 30 "
        "and 15 % of their MACs and repaired without labels; nothing is trained afterwards. Latency is measured in "
        "turns with the dense network: one image, one thread, its processor time. "
        "As large a share of the blocks vanishes as of the MACs; everything else is equal.",
        "",
        "These networks are so small that calls of operators take most of their time: fewer channels hardly make "
        "them faster, and fewer blocks do. An interval of two seeds says little; the number of "
        "blocks was set, not chosen by `DepthSettings(blocks=None)`; other processes ran on the machine, so single "
        "latencies are off by up to a tenth; segmentation and training after the cut were not compared.",
        "",
        "![Score against measured latency](figures/depth.png)",
        "",
        "Difference of the score at equal measured latency (depth and width minus width alone), averaged over the "
        "latencies that both methods reach, with the 95 % interval of a paired t-test over seeds:",
        "",
        "| network | seeds | difference | interval |",
        "|:--|--:|--:|:--|",
    ]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for network in networks:
        found = list(differences(rows, network).values())
        lines.append(f"| {network} | {len(found)} | {_mean(found)} | {_interval(found)} |")
    lines += [
        "",
        "Every cut, averaged over seeds (latency as a share of the dense network's):",
        "",
        "| network | MACs left | method | latency | score | dense | blocks gone |",
        "|:--|--:|:--|--:|--:|--:|--:|",
    ]
    for network in networks:
        for share in sorted({row["share"] for row in rows}, reverse=True):
            for method in COLOURS:
                chosen = [
                    r for r in rows if (r["network"], r["share"], r["method"]) == (network, share, method)
                ]
                if chosen:
                    time, score, dense = (
                        np.mean([r[key] for r in chosen]) for key in ("latency", "score", "dense")
                    )
                    gone = np.mean([len(r["blocks"]) for r in chosen])
                    lines.append(
                        f"| {network} | {share:.0%} | {method} | {time:.1%} | {score:.3f} | {dense:.3f} "
                        f"| {gone:.1f} |"
                    )
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):+.3f}" if values else "not measured"


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "none, with one seed"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values) - half:+.3f} to {np.mean(values) + half:+.3f}"


def _draw(rows: Sequence[Row], path: Path) -> None:
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(5.2 * len(networks), 3.6), squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        for seed in sorted({row["seed"] for row in rows if row["network"] == network}):
            for method, colour in COLOURS.items():
                times, scores = _curve(rows, network, seed, method)
                dense = next(
                    r["dense_milliseconds"] for r in rows if (r["network"], r["seed"]) == (network, seed)
                )
                axis.plot(
                    np.array(times) * dense, scores, "o-", color=colour, alpha=0.7, markersize=4, linewidth=1
                )
        axis.set(title=network, xlabel="milliseconds per image", ylabel="accuracy")
        axis.grid(alpha=0.25)
    for method, colour in COLOURS.items():
        axes[0][0].plot([], [], "o-", color=colour, label=method)
    axes[0][0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
