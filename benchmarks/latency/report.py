"""The page of ``python -m benchmarks.latency``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["page"]

RESOURCES = {"latency": "latency", "macs": "MACs"}
WIDTHS_TEXT = """\
ONNX Runtime computes convolutions in a layout of channel blocks (NCHWc) if their input has a multiple of four
channels. Otherwise it uses another layout, in which depthwise convolutions are many times slower: a network with
fewer MACs can then take longer than the dense one. Tables measure both kinds of widths and never interpolate between
them. For ONNX Runtime use `channel_multiple=16` (or 8, at least 4). Microseconds of a depthwise convolution, 5 x 5 on
14 x 14, by its number of channels:"""


def page(content: dict[str, Any], multiple: int, rounded: int) -> str:
    """Return the page (Markdown) of the stored numbers.

    Args:
        content: of the JSON.
        multiple: of channels, to which some cuts round.
        rounded: number of random cuts with this multiple.
    """
    rows = content["results"]
    lines = [
        "# Latency: predicted and measured",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']} · load {content['load']} "
        f"on {content['cores']} cores · {content['minutes']} minutes. Made by `python -m benchmarks.latency`.",
        "",
        "Errors of the predicted ratio to the dense network, for random cuts. Each cut is measured alternately with "
        "the dense network; times are processor time of one thread, tenth percentiles. *By MACs*: the error if the "
        f"share of the MACs is taken as the prediction. *Multiples of {multiple}*: the median error of {rounded} "
        f"more cuts that leave a multiple of {multiple} channels in each layer. Tables are built as in "
        "[budgets.md](../guides/budgets.md#latency).",
        "",
        *_errors(rows, multiple),
        "",
        "Networks with random weights, pruned by L2 to half of the latency (or half-way to the lowest latency that "
        "can be reached) and to the same share of the MACs; also with widths in multiples of "
        f"{multiple} (`channel_multiple={multiple}`). For a budget of latency the selection is made twice: between "
        "the two, the table is fitted to the first selection (`LatencyTable.refit`). A prediction below the budget "
        f"means that the last step was large: {multiple} channels, or a layer that changed its layout. A selection "
        "by the prediction prefers cuts whose latency is predicted too low, so the errors are larger than for random "
        "cuts. They are largest for a network of many small operators, such as mobilenet.",
        "",
        *_budgets(rows),
        *_widths(content["widths"]),
    ]
    return "\n".join(lines) + "\n"


def _errors(rows: Sequence[dict[str, Any]], multiple: int) -> list[str]:
    return [
        f"| network | execution | dense, ms | cuts | **median error** | largest | multiples of {multiple} | by MACs "
        "| time to build, CPU s |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['execution']} | {r['dense_ms']:.1f} | {r['cuts']} | **{r['median_error']:.1%}** "
            f"| {r['largest_error']:.1%} | {_percent(r['median_error_of_multiples'])} "
            f"| {r['median_error_of_macs']:.0%} | {r['build_cpu_seconds']:.0f} |"
            for r in rows
        ),
    ]


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.1%}"


def _budgets(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "| network | execution | budget | multiple | MACs | latency, predicted | **latency, measured** |",
        "|:--|:--|:--|--:|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['execution']} | {RESOURCES[b['budget']]} {b['share']:.0%} "
            f"| {b['multiple']} | {b['macs']:.1%} | {b['predicted']:.1%} | **{b['measured']:.1%}** |"
            for r in rows
            for b in r["budgets"]
        ),
    ]


def _widths(times: dict[str, dict[str, float]]) -> list[str]:
    widths = list(times["onnx"])
    return [
        "",
        WIDTHS_TEXT,
        "",
        f"| execution | {' | '.join(widths)} |",
        f"|:--|{'--:|' * len(widths)}",
        *(
            f"| {name} | {' | '.join(f'{by_width[w]:.0f}' for w in widths)} |"
            for name, by_width in times.items()
        ),
    ]
