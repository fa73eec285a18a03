"""``lightning-prune report``: write the page of a run or of a sweep, and draw the picture of a run again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning_prune.cli.pages import complete_run, write_safely
from lightning_prune.cli.parsers import read
from lightning_prune.cli.run_groups import group_runs, sweep_runs
from lightning_prune.cli.sweep import SWEEP_PAGE
from lightning_prune.reporting.figure import draw_report, show_run
from lightning_prune.reporting.pages.render import NO_PLOTLY, plotly_script
from lightning_prune.reporting.pages.run_page import write_run_page
from lightning_prune.reporting.pages.sweep_page import write_sweep_page
from lightning_prune.reporting.run_folder import NET, PAGE, REPORT, Summary, find_runs, is_run

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("report", arguments)
    try:
        _write(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-prune report: {error}") from error
    if not plotly_script():
        print(NO_PLOTLY, file=sys.stderr)


def _write(options: argparse.Namespace) -> None:
    """Write what the suffix of the path asks for; without a path the page, and the picture if there is one."""
    if not is_run(options.run) and any(map(is_run, options.run.glob("*"))):
        _sweep(options)
    elif options.out is not None and options.out.suffix == ".png":
        _picture(options.run, options.baseline, options.out)
    else:
        _page(options)


def _sweep(options: argparse.Namespace) -> None:
    """Write the page of a sweep, and those of its runs that have none."""
    if options.baseline is not None:
        raise ValueError(
            f"{options.run} is a sweep, which has no baseline: name it beside others: lightning-prune compare"
        )
    runs = sweep_runs(group_runs(find_runs([options.run])))
    for run in runs:
        if run.done and not (run.folder / PAGE).is_file():
            write_safely(partial(_write_missing, run.folder), f"lightning-prune report {run.folder}")
    path = options.out or options.run / SWEEP_PAGE
    print(write_sweep_page(runs, path, options.run.name, metric=options.metric))


def _write_missing(folder: Path) -> None:
    write_run_page(complete_run(folder))


def _page(options: argparse.Namespace) -> None:
    run = complete_run(options.run)
    baseline = None if options.baseline is None else complete_run(options.baseline)
    path = write_run_page(run, options.out, baseline, options.metric)
    if options.out is None and run.summary.final is not None:
        draw_report(run.summary, options.run / REPORT, None if baseline is None else baseline.summary)
    if run.summary.final is None:
        print(f"{options.run} is {run.summary.status}: {run.summary.error or f'there is no {NET}'} · {path}")
    else:
        show_run(run.summary, path)


def _picture(folder: Path, baseline: Path | None, path: Path) -> None:
    summary = _completed(folder)
    draw_report(summary, path, None if baseline is None else _completed(baseline))
    show_run(summary, path)


def _completed(run: Path) -> Summary:
    """Return the summary of a run that has something to draw."""
    summary = Summary.load(run)
    if summary.final is None:
        raise ValueError(
            f"{run} is {summary.status}, there is nothing to draw: {summary.error or 'no sizes'}"
        )
    return summary
