"""``lightning-prune report``: draw the picture of a run again from its summary, also against another run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.parsers import read
from lightning_prune.reporting.figure import draw_report, show_run
from lightning_prune.reporting.run_folder import REPORT, Summary

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("report", arguments)
    try:
        summary = _completed(options.run)
        baseline = None if options.baseline is None else _completed(options.baseline)
        path = options.out or options.run / REPORT
        draw_report(summary, path, baseline)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-prune report: {error}") from error
    show_run(summary, path)


def _completed(run: Path) -> Summary:
    """Return the summary of a run that has something to draw."""
    summary = Summary.load(run)
    if summary.final is None:
        raise ValueError(
            f"{run} is {summary.status}, there is nothing to draw: {summary.error or 'no sizes'}"
        )
    return summary
