"""The command line of a study whose rows are cases with a name each, resumable."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.pages import ReportFiles, page_parser

__all__ = ["run_cases"]

Row = dict[str, Any]


def run_cases(
    name: str,
    doc: str | None,
    cases: Collection[str],
    run: Callable[[str, Path], Row],
    section: Callable[[Mapping[str, Any]], str],
    arguments: Sequence[str] | None,
) -> list[Row]:
    """Run all cases that have no result yet, write the page after each, and return all rows.

    Args:
        name: of the page and of its section.
        doc: of the module, for ``--help``.
        cases: their names.
        run: returns the row of a case, whose ``"case"`` is its name, given a folder for all of them.
        section: returns the text of the section.
        arguments: of the command line.
    """
    args = page_parser(f"robustness.{name}", doc).parse_args(arguments)
    files = ReportFiles(name, args.docs)
    rows = files.runs()
    todo = [] if args.report else [case for case in cases if case not in {row["case"] for row in rows}]
    with tempfile.TemporaryDirectory() as parent:
        for case in todo:
            rows.append(run(case, Path(parent)))
            print(*rows[-1].values(), sep=" | ", flush=True)
            files.write_section(name, section(files.save_runs(rows)))
    files.write_section(name, section(files.load()))
    return rows
