"""``lightning-prune compare``: one table and one page of several runs, or of all runs of a sweep."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli.early_checks import located
from lightning_prune.cli.parsers import read
from lightning_prune.cli.run_groups import CAPTION, failures, group_runs, sweep_runs, table
from lightning_prune.cli.sweep import summarise
from lightning_prune.reporting.pages.sweep_page import write_sweep_page
from lightning_prune.reporting.run_folder import find_runs
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.tables import show
from lightning_prune.utils.terminal import fitted

__all__ = ["main"]

PAGE = "compare.html"


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("compare", arguments)
    try:
        options.runs = list(map(located, options.runs))
        if options.out:
            here = _common_folder(options.runs)
            summarise(options.runs, options.out, metric=options.metric, against=options.against, here=here)
        else:
            _show(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-prune compare: {error}") from error


def _show(options: argparse.Namespace) -> None:
    runs = find_runs(options.runs)
    groups = group_runs(runs)
    path = options.html or _common_folder(options.runs) / PAGE
    title = f"Comparison of {counted(len(runs), 'run')}"
    write_sweep_page(sweep_runs(groups), path, title, metric=options.metric, against=options.against)
    show(table(groups, _common_folder(options.runs)))
    print("\n".join([*failures(runs), fitted(CAPTION, ""), str(path)]), flush=True)


def _common_folder(folders: Sequence[Path]) -> Path:
    """Return the folder that holds all of these, or the present one if they have nothing in common."""
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if common in [folder.resolve() for folder in folders] and len(folders) > 1:
        common = common.parent
    return common if len(common.parts) > 2 and os.access(common, os.W_OK) else Path.cwd()
