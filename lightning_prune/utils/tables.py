"""Tables for terminals and Markdown files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

NOTHING = "-"


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

    def rich(self) -> RichTable:
        """Return the table for a terminal."""
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if number < self.left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def show(table: Table) -> None:
    """Print the table: formatted on a terminal, as Markdown elsewhere."""
    if sys.stdout.isatty():
        Console().print(table.rich())
    else:
        print(table.markdown(), flush=True)
