"""The page of ``python -m benchmarks.latency.selection``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

__all__ = ["page"]

Row = dict[str, Any]
TASKS = {
    "scenes": "scenes, mean IoU of a U-Net",
    "fashion": "fashion, accuracy of ResNet-20",
    "brain": "brain, mean IoU of a U-Net with the first stages of ResNet-18",
}
INTRODUCTION = """\
`selection="optimal"` chooses all widths at once by an integer program, `"greedy"` takes the least important units
one by one; see [budgets](../guides/budgets.md#optimal-selection). Latency is that of ONNX Runtime on one thread of
the processor, as a share of the dense network's: both run in turns, and the number is the median over five such
measurements. On a machine that also does other work these vary by up to 6 % around it, since neighbours displace
the weights of the larger network from the caches."""

VERDICT = """\
The program meets the budget in time more closely, since greedy cuts end with the step of a width that overshoots
it. Whether it keeps more depends on scores that may be added up: with shares of output energy it does, by far. The
default criterion is made for a ranking (a unit's score rises as its layer shrinks), and its optimum is not better
than its greedy plan. So the aim, at least one point more or half of the error in time, is met with both criteria by
the error, with shares also by the score; the best greedy plan and the best optimal one are level in score."""


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown) of the stored numbers."""
    loads = ", ".join(f"{part} {load}" for part, load in content.get("load", {}).items())
    lines = [
        "# Optimal selection against greedy selection",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']} · load: {loads}. Made by "
        "`python -m benchmarks.latency.selection`, which says how each number comes about.",
        "",
        INTRODUCTION,
    ]
    lines += _scores(content.get("scores", []))
    lines += _mobile(content.get("mobile", []), "in ONNX Runtime at half of its latency", 0.5)
    lines += _mobile(content.get("mobile-eager", []), "in PyTorch, eager, at 74 % of its latency", 0.74)
    lines += _programs(content.get("programs", []))
    return "\n".join(lines) + "\n"


def _scores(rows: Sequence[Row]) -> list[str]:
    """Return the table of scores, a line for each task, selection and multiple."""
    if not rows:
        return []
    lines = [
        "",
        "## Scores at half of the latency",
        "",
        f"Networks and data of [quality](quality.md): {'; '.join(TASKS[task] for (task,) in _keys(rows, 'task'))}. "
        "Widths are multiples of 8. Cut, repaired, then trained for 100 steps. *Error*: mean distance of the "
        "measured latency from 50 %, as a share of it.",
        "",
        "| task | criterion | selection | seeds | MACs | latency, measured | error | after cut | trained | dense |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for task, criterion, selection in _keys(rows, "task", "criterion", "selection"):
        group = [
            r for r in rows if (r["task"], r["criterion"], r["selection"]) == (task, criterion, selection)
        ]
        mean = {
            key: fmean(r[key] for r in group) for key in ("macs", "measured", "after_cut", "trained", "dense")
        }
        error = fmean(abs(r["measured"] / 0.5 - 1) for r in group)
        lines.append(
            f"| {task} | {criterion} | {selection} | {len(group)} | {mean['macs']:.1%} | {mean['measured']:.1%} "
            f"| {error:.1%} | {mean['after_cut']:.3f} | **{mean['trained']:.3f}** | {mean['dense']:.3f} |"
        )
    return [*lines, "", *_differences(rows), "", VERDICT]


def _differences(rows: Sequence[Row]) -> list[str]:
    """Return the gain of the optimal selection over the greedy one by seed, for each task and criterion."""
    lines = []
    for task, criterion in [*_keys(rows, "task", "criterion"), *((t, "") for (t,) in _keys(rows, "task"))]:
        group = [r for r in rows if r["task"] == task and criterion in ("", r["criterion"])]
        gains = [_gain([r for r in group if r["seed"] == seed]) for (seed,) in _keys(group, "seed")]
        values = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
        name = criterion or "the best criterion of each"
        lines.append(
            f"- {task}, {name}: optimal less greedy, points by seed: {values}; mean {100 * fmean(gains):+.1f}."
        )
    return lines


def _gain(rows: Sequence[Row]) -> float:
    """Return the best trained score of the optimal selection less that of the greedy one."""
    best = {name: [r["trained"] for r in rows if r["selection"] == name] for name in ("greedy", "optimal")}
    return max(best["optimal"], default=float("nan")) - max(best["greedy"], default=float("nan"))


def _mobile(rows: Sequence[Row], how: str, aim: float) -> list[str]:
    """Return the table of MobileNet-V3-small."""
    if not rows:
        return []
    return [
        "",
        f"## MobileNet-V3-small {how}",
        "",
        f"Random weights, L2. *Importance*: what is removed, as a share of all. Aim: {100 * aim:.0f} % within 5 % "
        f"({95 * aim:.1f} to {105 * aim:.1f} %).",
        "",
        "| selection | multiple | MACs | importance | predicted | latency, measured | smallest, largest | seconds |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {r['selection']} | {r['multiple']} | {r['macs']:.1%} | {r['loss']:.1%} | {r['predicted']:.1%} "
            f"| **{median(r['measured']):.1%}** | {min(r['measured']):.1%}, {max(r['measured']):.1%} "
            f"| {r['seconds']:.0f} |"
            for r in rows
        ),
    ]


def _programs(rows: Sequence[Row]) -> list[str]:
    """Return the table of times."""
    if not rows:
        return []
    return [
        "",
        "## Time of a selection",
        "",
        "Half of the MACs and half of the parameters at once; random weights, L2. Processor time. *Gap*: how much "
        "more importance than necessary the plan may remove, as a share.",
        "",
        "| network | multiple | selection | importance removed | gap | seconds |",
        "|:--|--:|:--|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['multiple']} | {r['selection']} | {r['loss']:.1%} "
            f"| {'' if r['gap'] is None else format(r['gap'], '.2%')} | {r['seconds']:.1f} |"
            for r in rows
        ),
    ]


def _keys(rows: Sequence[Row], *names: str) -> list[tuple[Any, ...]]:
    """Return the distinct values of some columns, in the order of the rows."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
