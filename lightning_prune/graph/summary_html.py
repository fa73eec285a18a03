"""A summary of a network as HTML: for notebooks, pages and mails, without scripts and without anything to load."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from lightning_prune.graph.summary_text import (
    NAMES,
    change,
    label_of,
    legend,
    pin_numbers,
    titles,
)

__all__ = ["html_of", "html_table"]

# Colours come from the surroundings, so that dark notebooks stay dark.
STYLE = """<style>
.lp-summary {font: 13px/1.45 system-ui, sans-serif; max-width: 60em}
.lp-summary .lp-scroll {overflow-x: auto}
.lp-summary table {border-collapse: collapse; margin: .6em 0; font-size: 13px}
.lp-summary th, .lp-summary td {padding: .15em .8em .15em 0; text-align: right; white-space: nowrap;
  border: 0; background: none}
.lp-summary th {border-bottom: 1px solid #8888; font-weight: 600}
.lp-summary .lp-left, .lp-summary td.lp-mark {text-align: left}
.lp-summary tr.lp-same td {opacity: .55}
.lp-summary .lp-bar {display: inline-block; width: 6em; height: .7em; background: #8883; border-radius: 2px}
.lp-summary .lp-bar i {display: block; height: 100%; background: #1565c0; border-radius: 2px}
.lp-summary dl {display: grid; grid-template-columns: max-content auto; gap: 0 .8em; margin: .4em 0}
.lp-summary dt {text-align: right; color: #1e88e5} .lp-summary dd {margin: 0}
.lp-summary p {margin: .1em 0} .lp-summary .lp-note {opacity: .7}
</style>"""


def html_of(summary: Any) -> str:
    """Return title, table and legend of a summary."""
    pins = pin_numbers(summary)
    heads = [
        "layer",
        "kind",
        "channels",
        *([""] * summary.cut),
        *(NAMES.get(r, r) for r in summary.totals),
        "",
    ]
    rows = [_row(layer, summary, label_of(layer, pins)) for layer in summary.layers]
    others = [change(resource, each, summary.cut) for resource, each in summary.others.items()]
    last = _tr(["norms and others", "", "", *([""] * summary.cut), *map(escape, others), ""], "lp-same")
    table = html_table(heads, [*rows, last], left=2)
    marks = "".join(f"<dt>{escape(mark)}</dt><dd>{escape(meaning)}</dd>" for mark, meaning in legend(summary))
    notes = "".join(f"<p class='lp-note'>{escape(note)}</p>" for note in summary.notes)
    lines = "".join(f"<p><b>{escape(line)}</b></p>" for line in titles(summary))
    return f"<div class='lp-summary'>{STYLE}{lines}{table}<dl>{marks}</dl>{notes}</div>"


def html_table(heads: Iterable[str], rows: Iterable[str], left: int = 1) -> str:
    """Return a table that scrolls sideways where it is too wide.

    Args:
        heads: titles of the columns.
        rows: HTML of the rows.
        left: number of columns whose titles are aligned to the left.
    """
    cells = (
        f"<th class='lp-left'>{escape(head)}</th>" if number < left else f"<th>{escape(head)}</th>"
        for number, head in enumerate(heads)
    )
    return f"<div class='lp-scroll'><table><tr>{''.join(cells)}</tr>{''.join(rows)}</table></div>"


def _row(layer: Any, summary: Any, mark: str) -> str:
    costs = [change(resource, layer.costs[resource], summary.cut) for resource in summary.totals]
    bar = [_bar(layer.channels)] if summary.cut else []
    channels = change("channels", layer.channels, summary.cut)
    texts = [escape(layer.name), escape(layer.kind), channels, *bar, *map(escape, costs), mark]
    same = summary.cut and layer.channels.before == layer.channels.after
    return _tr(texts, "lp-same" if same and not any("→" in text for text in costs) else "")


def _tr(cells: Iterable[str], css: str = "", left: int = 2) -> str:
    *first, mark = cells
    texts = [
        f"<td class='lp-left'>{cell}</td>" if number < left else f"<td>{cell}</td>"
        for number, cell in enumerate(first)
    ]
    return f"<tr class='{css}'>{''.join(texts)}<td class='lp-mark'>{mark}</td></tr>"


def _bar(channels: Any) -> str:
    share = 100 * channels.after / max(channels.before, 1)
    return f"<span class='lp-bar' title='{share:.0f} % left'><i style='width:{share:.0f}%'></i></span>"
