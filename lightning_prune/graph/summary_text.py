"""A summary of a network for a terminal: a table that fits its width, and a legend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_prune.utils.formatting import si

__all__ = ["amount", "change", "group_label", "label_of", "legend", "pin_numbers", "renderables", "titles"]

NARROW, WIDE = 80, 100  # columns from which parameters, and bars, are shown too
BAR = 10
FULL, EMPTY = "━", "┄"
LEGEND_LINES = 12
LEAST_ROOM = 20  # columns for names, before resources are left out
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
NAMES = {"macs": "MACs", "params": "parameters"}


def amount(resource: str, number: float) -> str:
    """Return an amount of a resource as text; latencies, in nanoseconds, as milliseconds, and channels exactly.

    Example:
        >>> amount("macs", 412_345_678), amount("latency", 27_612_000), amount("latency", 999_900)
        ('412M', '27.6 ms', '1 ms')
        >>> amount("channels", 2304)
        '2304'
    """
    if resource == "channels":
        return str(number)
    if resource != "latency":
        return si(number)
    unit = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))
    factor, name = next((pair for pair in unit if number >= 0.9995 * pair[0]), (1, "ns"))
    return f"{si(number / factor)} {name}"


def change(resource: str, numbers: Any, cut: bool = True) -> str:
    """Return a number before and after, or once if it stays the same."""
    before, after = amount(resource, numbers.before), amount(resource, numbers.after)
    return before if not cut or numbers.before == numbers.after else f"{before} → {after}"


def group_label(number: int) -> str:
    """Return a letter for each group of coupled layers.

    Example:
        >>> group_label(0), group_label(25), group_label(26)
        ('A', 'Z', 'AA')
    """
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def titles(summary: Any) -> list[str]:
    """Return one line per resource: before, after, share and budget."""
    lines = []
    for resource, total in summary.totals.items():
        line = f"{NAMES.get(resource, resource)} {change(resource, total, summary.cut)}"
        if summary.cut:
            line += f", {total.after / max(total.before, 1):.1%} left"
        if (target := summary.targets.get(resource)) is not None:
            line += f" (budget {amount(resource, target)}{'' if total.after <= target else ', not met'})"
        lines.append(line)
    return lines


def pin_numbers(summary: Any) -> dict[str, int]:
    """Return reason -> number, from 1, of all pinned filters."""
    reasons = dict.fromkeys(reason for layer in summary.layers for reason in layer.pinned)
    return {reason: number for number, reason in enumerate(reasons, 1)}


def label_of(layer: Any, pins: Mapping[str, int]) -> str:
    """Return the marks of a layer: its group, the numbers of the reasons why it is pinned, and a full limit."""
    group = "" if layer.group is None else group_label(layer.group)
    numbers = ",".join(str(pins[reason]) for reason in layer.pinned)
    marks = f"{group}{numbers.translate(SUPERSCRIPTS)}"
    return f"{marks:<2}▪" if layer.closed else marks


def legend(summary: Any) -> list[tuple[str, str]]:
    """Return (mark, meaning) of the marks of all layers."""
    rows = []
    for number, group in enumerate(summary.groups):
        rows.append((group_label(number), f"{group} shared by {_list(group.layers)}"))
    for reason, number in pin_numbers(summary).items():
        count = sum(layer.pinned.get(reason, 0) for layer in summary.layers)
        where = _list([layer.name for layer in summary.layers if reason in layer.pinned])
        rows.append((str(number).translate(SUPERSCRIPTS), f"{count} pinned: {reason} - {where}"))
    closed = dict.fromkeys(layer.closed for layer in summary.layers if layer.closed)
    rows += [("▪", f"loses no more: {reason}") for reason in closed]
    return rows


def _list(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def renderables(summary: Any, width: int) -> Iterator[RenderableType]:
    """Yield title, table and legend for a terminal of so many columns."""
    for line in titles(summary):
        yield Text(line, style="bold")
    yield Padding(_table(summary, width), (1, 0))
    rows = legend(summary)
    if len(rows) > LEGEND_LINES:
        rows = [*rows[: LEGEND_LINES - 1], ("…", f"{len(rows) - LEGEND_LINES + 1} more, in JSON and HTML")]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="cyan", justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for mark, meaning in rows:
        grid.add_row(mark, Text(meaning))
    if rows:
        yield grid
    for note in summary.notes:
        yield Text(note, style="dim")


def _table(summary: Any, width: int) -> Table:
    """Return the table with as many resources as leave room for names: parameters go first, then the last one."""
    resources = [r for r in summary.totals if width >= NARROW or r != "params" or len(summary.totals) == 1]
    heads, cells, room = _columns(summary, resources, width)
    while room < LEAST_ROOM and len(resources) > 1:
        resources.remove("params" if "params" in resources else resources[-1])
        heads, cells, room = _columns(summary, resources, width)
    return _filled(heads, cells, max(room, 12))


def _columns(
    summary: Any, resources: Sequence[str], width: int
) -> tuple[list[str], list[Sequence[str]], int]:
    """Return headings, rows, and the columns that are left for names."""
    pins, bars = pin_numbers(summary), summary.cut and width >= WIDE
    cells: list[Sequence[str]] = [
        _cells(layer, resources, pins, summary.cut, bars) for layer in summary.layers
    ]
    if any(summary.others[resource].before for resource in resources):
        others = [change(r, summary.others[r], summary.cut) for r in resources]
        cells.append(["norms and others", *([""] * (1 + bars)), *others, ""])
    heads = ["layer", "channels", *([""] * bars), *(NAMES.get(r, r) for r in resources), ""]
    widths = [max([len(heads[i]), *(len(row[i]) for row in cells)]) for i in range(1, len(heads))]
    return heads, cells, width - sum(widths) - 2 * len(widths)


def _filled(heads: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> Table:
    """Return the table with names of at most ``room`` characters; of longer ones the end is shown."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    for number, head in enumerate(heads):
        plain = number == 0 or not head
        table.add_column(head, justify="left" if plain else "right", no_wrap=True)
    for name, *others in cells:
        short = name if len(name) <= room else f"…{name[len(name) - room + 1 :]}"
        unchanged = all("→" not in text for text in others)
        table.add_row(Text(short), *map(_coloured, others), style="dim" if unchanged else "")
    return table


def _cells(layer: Any, resources: Sequence[str], pins: Mapping[str, int], cut: bool, bars: bool) -> list[str]:
    costs = [change(resource, layer.costs[resource], cut) for resource in resources]
    bar = [_bar(layer.channels)] if bars else []
    return [layer.name, change("channels", layer.channels, cut), *bar, *costs, label_of(layer, pins)]


def _bar(channels: Any) -> str:
    """Return a bar of the share of the channels that stays; none that stay are shown as none."""
    full = round(BAR * channels.after / channels.before) if channels.before else 0
    full = max(full, 1) if channels.after else 0
    return FULL * full + EMPTY * (BAR - full)


def _coloured(text: str) -> Text:
    """Return a cell with the number before a cut dimmed, and bars and marks in colour."""
    before, arrow, after = text.partition(" → ")
    if arrow:
        return Text.assemble((before + arrow, "dim"), after)
    if FULL in text or EMPTY in text:
        return Text.assemble((text.rstrip(EMPTY), "green"), (EMPTY * text.count(EMPTY), "dim"))
    return Text(text)
