"""``lightning-prune compare``: one table of several runs, or of all runs of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.parsers import read
from lightning_prune.cli.sweep import CAPTION, failures, group_runs, summarise, table
from lightning_prune.reporting.run_folder import find_runs
from lightning_prune.utils.tables import show

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("compare", arguments)
    try:
        if options.out:
            summarise(options.runs, options.out)
        else:
            _show(options.runs)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-prune compare: {error}") from error


def _show(folders: Sequence[Path]) -> None:
    runs = find_runs(folders)
    show(table(group_runs(runs)))
    print("\n".join([*failures(runs), CAPTION]), flush=True)
