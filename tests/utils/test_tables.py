"""Tests of tables on terminals of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightning_prune.utils.tables import Table

SCORES = ("0.7312 ± 0.0123", "0.3444 ± 0.0022", "66.0 ± 10.1", "50.0 ± 0.1")


def drawn(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for part in table.fitted(console):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_number_is_broken_on_terminals_of_any_width(width: int) -> None:
    rows = [[f"multirun/2026-11-28/00-30-0{number}", *SCORES] for number in range(3)]
    lines = drawn(Table(["run", "test mIoU", "val/loss", "latency %", "prune.criterion.omega"], rows), width)
    assert max(map(len, lines)) <= width
    assert [sum(line.count(score) for line in lines) for score in SCORES] == [3] * 4


def test_rows_become_columns_where_there_is_no_room_for_all_columns() -> None:
    table = Table(["run", *"abcdef"], [["first", *["0.7312 ± 0.0123"] * 6], ["second", *["1"] * 6]])
    lines = [line.split() for line in drawn(table, 60) if line.strip()]
    assert lines[0] == ["run", "first", "second"]
    assert lines[2] == ["a", "0.7312", "±", "0.0123", "1"]


def test_a_table_that_fits_is_one_table_with_whole_headings() -> None:
    lines = [line.rstrip() for line in drawn(Table(["net", "latency, 1 image"], [["dense", "10 ms"]]), 60)]
    assert lines[1:4] == [
        " net     latency, 1 image",
        " ────────────────────────",
        " dense              10 ms",
    ]
