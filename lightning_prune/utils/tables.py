"""Tables for terminals and Markdown files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

NOTHING = "-"
LEAST_TEXT = 16  # columns for a text that is folded


@dataclass(frozen=True)
class Table:
    """Table of texts.

    Args:
        header: one text per column.
        rows: rows of as many texts.
        left: number of columns, from the first, that are aligned to the left; the others are aligned to the right.

    Example:
        >>> print(Table(("layer", "filters"), [("conv1", "64"), ("head", "3")]).markdown())
        | layer | filters |
        | :---- | ------: |
        | conv1 |      64 |
        | head  |       3 |
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        """Return the table as Markdown, with padded columns, so that it is readable as plain text too."""
        columns = list(zip(self.header, *self.rows, strict=True))
        widths = [max(3, *(len(cell) for cell in column)) for column in columns]
        rule = [":" + "-" * (w - 1) if i < self.left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        lines = [self._line(row, widths) for row in (self.header, *self.rows)]
        return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = (
            c.ljust(w) if i < self.left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    def rich(self, widths: Sequence[int | None] = ()) -> RichTable:
        """Return the table for a terminal.

        Args:
            widths: of the columns, in characters; empty: as they need.
        """
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(self.header):
            justify: Literal["left", "right"] = "left" if number < self.left else "right"
            width = widths[number] if widths else None
            table.add_column(name, justify=justify, overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*row)
        return table

    def fitted(self, console: Console) -> list[RichTable]:
        """Return the table as one or more that fit the console and break no number.

        Where the columns are too wide, their headings are broken between words, then the texts on the left are
        folded. Where that is not enough, rows become columns, or each table has some of the columns: whichever makes
        fewer tables.
        """
        two_lines, words = (self._least_widths(part) for part in (_halves, str.split))
        for table in (self.rich(), self.rich(two_lines), self.rich(words), self._folded(console)):
            if _width(table, console) <= console.width:
                return [table]
        return min(self._turned(console), self._parts(console), key=len)

    def _least_widths(self, parts: Callable[[str], Sequence[str]] = str.split) -> list[int]:
        """Return the widths that the cells need, and the parts into which the headings are broken."""
        columns = zip(self.header, *self.rows, strict=True)
        return [max(map(cell_len, [*parts(heading), *cells, ""])) for heading, *cells in columns]

    def _folded(self, console: Console) -> RichTable:
        """Return the table with its texts on the left as narrow as necessary, but not below ``LEAST_TEXT``."""
        widths = self._least_widths()
        excess = _width(self.rich(widths), console) - console.width
        for number in sorted(range(self.left), key=lambda column: -widths[column]):
            smaller = min(widths[number], max(widths[number] - max(excess, 0), LEAST_TEXT))
            excess -= widths[number] - smaller
            widths[number] = smaller
        return self.rich(widths)

    def _turned(self, console: Console) -> list[RichTable]:
        """Return tables whose columns are rows of this one."""
        tables: list[RichTable] = []
        rows = list(self.rows)
        while rows:
            turned = (self._turn(rows[:number]) for number in range(len(rows), 1, -1))
            fits = next((each for each in turned if _width(each.rich(), console) <= console.width), None)
            chosen = fits or self._turn(rows[:1])
            tables.append(chosen.rich())
            rows = rows[len(chosen.header) - 1 :]
        return tables

    def _parts(self, console: Console) -> list[RichTable]:
        """Return tables with the texts on the left and as many of the other columns as there is room for."""
        tables: list[RichTable] = []
        columns = list(range(self.left, len(self.header)))
        while columns:
            chosen = (self._part(columns[:number]) for number in range(len(columns), 0, -1))
            parts = (part.rich(part._least_widths()) for part in chosen)
            fits = next((each for each in parts if _width(each, console) <= console.width), None)
            tables.append(fits or self._part(columns[:1])._folded(console))
            columns = columns[len(tables[-1].columns) - self.left :]
        return tables

    def _part(self, columns: Sequence[int]) -> Table:
        chosen = [*range(self.left), *columns]
        rows = [[row[column] for column in chosen] for row in self.rows]
        return Table([self.header[column] for column in chosen], rows, self.left)

    def _turn(self, rows: Sequence[Sequence[str]]) -> Table:
        heading, *lines = zip(self.header, *rows, strict=True)
        return Table(heading, lines)


def _halves(heading: str) -> list[str]:
    """Return a heading in two lines that are as short as possible.

    Example:
        >>> _halves("pruned / dense"), _halves("seeds")
        (['pruned', '/ dense'], ['seeds'])
    """
    words = heading.split()
    halves = ([" ".join(words[:number]), " ".join(words[number:])] for number in range(1, len(words)))
    return min(halves, key=lambda lines: max(map(cell_len, lines)), default=[heading])


def _width(table: RichTable, console: Console) -> int:
    """Return the width that a table needs on one line per row."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def show(table: Table) -> None:
    """Print the table: formatted on a terminal, so that it fits, as Markdown elsewhere."""
    if sys.stdout.isatty():
        console = Console()
        for each in table.fitted(console):
            console.print(each)
    else:
        print(table.markdown(), flush=True)
