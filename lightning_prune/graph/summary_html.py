"""A summary of a network as HTML: for notebooks, pages and mails, without scripts and without anything to load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from lightning_prune.graph.picture_layout import blocks_of
from lightning_prune.graph.summary_text import (
    NAMES,
    amount,
    change,
    label_of,
    legend,
    pin_numbers,
    titles,
)
from lightning_prune.utils.formatting import counted

__all__ = ["html_of", "html_table"]

MOST_ROWS = 120  # shown at once; the layers of larger networks are folded into blocks
MOST_BLOCKS = 60
MOST_MARKS = 14  # lines of the legend that are shown at once

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
.lp-summary details {margin: 0 0 .2em} .lp-summary summary {cursor: pointer}
.lp-summary summary span {opacity: .7; margin-left: .8em; white-space: nowrap}
.lp-summary details table {margin-left: 1em}
.lp-summary p {margin: .1em 0} .lp-summary .lp-note {opacity: .7}
</style>"""


def html_of(summary: Any) -> str:
    """Return title, table and legend of a summary; of a large network the table is folded, block by block."""
    notes = "".join(f"<p class='lp-note'>{escape(note)}</p>" for note in summary.notes)
    lines = "".join(f"<p><b>{escape(line)}</b></p>" for line in titles(summary))
    tables = _table(summary) if len(summary.layers) <= MOST_ROWS else _folded(summary)
    return f"<div class='lp-summary'>{STYLE}{lines}{tables}{_legend(summary)}{notes}</div>"


def _table(summary: Any) -> str:
    return _layer_table(summary, summary.layers, [_others(summary)] if summary.others else [])


def _layer_table(summary: Any, layers: Iterable[Any], more: Sequence[str] = ()) -> str:
    """Return the table of some layers, and the rows ``more``."""
    pins = pin_numbers(summary)
    resources = [NAMES.get(resource, resource) for resource in summary.totals]
    heads = ["layer", "kind", "channels", *([""] * summary.cut), *resources, ""]
    rows = [_row(layer, summary, label_of(layer, pins)) for layer in layers]
    return html_table(heads, [*rows, *more], left=2)


def _others(summary: Any) -> str:
    others = [change(resource, each, summary.cut) for resource, each in summary.others.items()]
    return _tr(["norms and others", "", "", *([""] * summary.cut), *map(escape, others), ""], "lp-same")


def _folded(summary: Any) -> str:
    """Return a table for each block, which a click unfolds, and one of what is not a layer."""
    blocks = blocks_of([f"{layer.name}.weight" for layer in summary.layers], MOST_BLOCKS)
    # One pass in the order of the layers: a block that others interrupt is shown in parts.
    parts = groupby(summary.layers, key=lambda layer: blocks[f"{layer.name}.weight"])
    folds = [_fold(summary, block, list(layers)) for block, layers in parts]
    return "".join([*folds, html_table([], [_others(summary)]) if summary.others else ""])


def _fold(summary: Any, block: str, layers: Sequence[Any]) -> str:
    facts = [f"{len(layers)} layer{'s' * (len(layers) != 1)}", _sum("channels", layers, summary.cut)]
    facts += [_sum(resource, layers, summary.cut) for resource in summary.totals]
    texts = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    head = f"<summary>{escape(block)}{texts}</summary>"
    return f"<details>{head}{_layer_table(summary, layers)}</details>"


def _sum(resource: str, layers: Iterable[Any], cut: bool) -> str:
    """Return a resource of some layers before and after, with its name."""
    changes = [layer.channels if resource == "channels" else layer.costs[resource] for layer in layers]
    before, after = (sum(getattr(each, when) for each in changes) for when in ("before", "after"))
    text = amount(resource, before)
    text += f" → {amount(resource, after)}" if cut and before != after else ""
    return f"{text} {NAMES.get(resource, resource)}"


def _legend(summary: Any) -> str:
    """Return the meanings of all marks; those beyond the first ones unfold."""
    marks = [f"<dt>{escape(mark)}</dt><dd>{escape(meaning)}</dd>" for mark, meaning in legend(summary)]
    shown, more = "".join(marks[:MOST_MARKS]), marks[MOST_MARKS:]
    rest = f"<details><summary>{counted(len(more), 'more mark')}</summary><dl>{''.join(more)}</dl></details>"
    return f"<dl>{shown}</dl>{rest if more else ''}"


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
