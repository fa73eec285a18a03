"""A table over many runs: mean and standard deviation over seeds, for each combination of the other settings.

It is written at the end of a sweep. ``python -m lightning_prune.cli.sweep DIR [DIR ...] [--out DIR]`` makes it from
any runs; each ``DIR`` is the folder of a run or of a sweep.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lightning_prune.cli.pages import write_safely
from lightning_prune.cli.run_groups import CAPTION, Group, failures, group_runs, sweep_runs, table, write
from lightning_prune.cli.sweep_state import PENDING, SweepState, number_of_runs
from lightning_prune.reporting.pages.sweep_page import write_sweep_page
from lightning_prune.reporting.run_folder import find_runs
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.tables import show
from lightning_prune.utils.terminal import fitted

__all__ = ["Group", "SweepTable", "group_runs", "main", "sweep_runs", "table", "write"]

RUNNING: list[Path] = []  # folder of the sweep that this process runs
SWEEP_PAGE = "sweep.html"


def summarise(
    folders: Iterable[str | Path],
    out: Path,
    command: str = "",
    metric: str | None = None,
    against: str = "macs",
    here: Path | None = None,
) -> list[str]:
    """Find the runs, print and write their table and their page.

    Args:
        folders: of runs or sweeps.
        out: folder to write into.
        command: that made the runs, if they are a sweep.
        metric: the score of the page.
        against: size on the axis of the Pareto front of the page.
        here: a folder from which the table names those of the runs; None: it has their settings only.

    Returns:
        One line for each run that failed or is unfinished.
    """
    runs = find_runs(folders)
    groups = group_runs(runs)
    out.mkdir(parents=True, exist_ok=True)
    write(groups, out, command, here)
    failed = failures(runs)
    show(table(groups, here))
    again = f"lightning-prune report {out}"
    write_safely(lambda: _write_page(groups, out, command, metric, against), again)
    counts = [f"{len(failed)} of {counted(len(runs), 'run')} not completed:", *failed] if failed else []
    page = f"{out / SWEEP_PAGE} (also sweep.md, .csv, .json)"
    print("\n".join([*counts, fitted(CAPTION, ""), page]), flush=True)
    return failed


def _write_page(groups: Sequence[Group], out: Path, command: str, metric: str | None, against: str) -> None:
    runs = sweep_runs(groups)
    title = f"{'Sweep' if command else 'Comparison'} of {counted(len(runs), 'run')}"
    write_sweep_page(runs, out / SWEEP_PAGE, title, command, metric, against)


class SweepTable(Callback):
    """Hydra callback that notes a sweep in its folder, and makes the table after the last run.

    The command fails if a run has failed.

    Example:
        >>> isinstance(SweepTable(), Callback)  # conf/config.yaml: hydra.callbacks.table._target_
        True
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write ``sweep_state.json``, by which an interrupted sweep is continued, and print the number of runs."""
        folder, overrides = Path(config.hydra.sweep.dir), list(config.hydra.overrides.task)
        state = PENDING.pop() if PENDING else SweepState(overrides)
        if state.runs is None:
            state = replace(state, runs=number_of_runs(overrides, config.hydra.sweeper))
        folder.mkdir(parents=True, exist_ok=True)
        state.save(folder)
        RUNNING.append(folder)
        print(
            f"sweep of {counted(state.runs, 'run') if state.runs else 'several runs'} · {folder}", flush=True
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table."""
        folder = Path(config.hydra.sweep.dir)
        if finish(folder, list(config.hydra.overrides.task)):
            state = SweepState.load(folder) or SweepState()
            print(f"to make them again: {state.command(folder)}", file=sys.stderr, flush=True)
            raise SystemExit(1)


def finish(folder: Path, overrides: Sequence[str], status: str = "finished") -> list[str]:
    """Print and write the table of a sweep, note its status, and return a line for each run that is not completed."""
    state = SweepState.load(folder) or SweepState(list(overrides))
    if folder in RUNNING:
        RUNNING.remove(folder)
    command = shlex.join(["lightning-prune", "-m", *state.flags, *state.overrides])
    failed = summarise([folder], folder, command)
    state.with_status("failed" if failed and status == "finished" else status).save(folder)
    return failed


def stop_running(status: str) -> None:
    """Make the table of a sweep that has ended before its last run, and print how to go on with it."""
    for folder in list(RUNNING):
        state = SweepState.load(folder) or SweepState()
        try:
            finish(folder, state.overrides, status)
        except FileNotFoundError:  # not a single run was begun
            state.with_status(status).save(folder)
        print(f"the sweep is {status}; to go on: {state.command(folder)}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m lightning_prune.cli.sweep``; ``--help`` lists its arguments."""
    parser = argparse.ArgumentParser(prog="python -m lightning_prune.cli.sweep", description=CAPTION)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run or of a sweep")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for sweep.md, .csv and .json; default: the first DIR"
    )
    options = parser.parse_args(arguments)
    try:
        summarise(options.folders, Path(options.out or options.folders[0]))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
