"""The page of ``python -m benchmarks.latency``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["page"]

KINDS = {"latency": "latency", "macs": "MACs"}
WHY = """\
ONNX Runtime brings convolutions into a layout of blocks of channels (NCHWc), if what they read has a multiple of
four channels; otherwise it runs them without, and depthwise ones many times slower: without a part of its MACs a
network can take longer than the dense one. Tables measure both kinds of widths and never interpolate between them.
The advice: `channel_multiple=16` (or 8, at least 4) for what shall run in ONNX Runtime. A depthwise convolution,
5 x 5 on 14 x 14, microseconds by channels:"""


def page(rows: Sequence[dict[str, Any]], head: dict[str, Any], multiple: int, rounded: int) -> str:
    """The results as Markdown.

    Args:
        rows: of each network and execution.
        head: where and when.
        multiple: of channels, that some cuts leave.
        rounded: how many of the random ones.
    """
    lines = [
        "# Latency: predicted and measured",
        "",
        f"{head['date']} · torch {head['versions']['torch']} · {head['machine']} · load {head['load']} on "
        f"{head['cores']} cores · {head['minutes']} minutes. Made by `python -m benchmarks.latency`.",
        "",
        "Random cuts, measured in turns with the dense network; the error is that of the ratio to the dense network. "
        "Times are processor time of the one thread, tenth percentiles. *By MACs*: the error of taking the share of "
        f"the MACs for that of the time. *By {multiple}*: the median error of {rounded} more cuts, in which every "
        f"layer keeps a multiple of {multiple} channels. Tables are built as in [budgets.md](budgets.md#time).",
        "",
        *_errors(rows, multiple),
        "",
        "Pruned by L2 (random weights) to half of the latency (where that is out of reach, to half of what can go), "
        "and to the same share of the MACs, also with widths in multiples of "
        f"{multiple} (`channel_multiple={multiple}`). For the latency, what goes is chosen twice: in between, the "
        "table is fitted to the first choice (`LatencyTable.refit`). Where the prediction is below the budget, the "
        "last step was a large one: sixteen channels, or a layer that changed its layout. What is chosen by the "
        "prediction is chosen for its errors, too, so budgets are off by more than random cuts are; mobilenet, of a "
        "hundred small pieces, has the least to go by.",
        "",
        *_budgets(rows),
        *_widths(head["widths"]),
    ]
    return "\n".join(lines) + "\n"


def _errors(rows: Sequence[dict[str, Any]], multiple: int) -> list[str]:
    return [
        f"| network | execution | dense, ms | cuts | **median error** | largest | by {multiple} | by MACs "
        "| to build, CPU s |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['execution']} | {r['dense_ms']:.1f} | {r['cuts']} | **{r['median_error']:.1%}** "
            f"| {r['largest_error']:.1%} | {_shown(r['median_error_of_multiples'])} "
            f"| {r['median_error_of_macs']:.0%} | {r['build_cpu_seconds']:.0f} |"
            for r in rows
        ),
    ]


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.1%}"


def _budgets(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "| network | execution | budget | multiple | MACs | latency, predicted | **latency, measured** |",
        "|:--|:--|:--|--:|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['execution']} | {KINDS[each['budget']]} {each['share']:.0%} "
            f"| {each['multiple']} | {each['macs']:.1%} | {each['predicted']:.1%} | **{each['measured']:.1%}** |"
            for r in rows
            for each in r["budgets"]
        ),
    ]


def _widths(times: dict[str, dict[str, float]]) -> list[str]:
    counts = list(times["onnx"])
    return [
        "",
        WHY,
        "",
        f"| execution | {' | '.join(counts)} |",
        f"|:--|{'--:|' * len(counts)}",
        *(f"| {name} | {' | '.join(f'{each[c]:.0f}' for c in counts)} |" for name, each in times.items()),
    ]
