"""``lightning-prune``: train, prune while training, and test; one run or a sweep.

``lightning-prune KEY=VALUE ...`` is a Hydra application; the commands in :mod:`lightning_prune.cli.commands` have
parsers of their own. Nothing here imports torch before the command line is known to be right.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.commands import COMMANDS, OVERVIEW, run_command, unknown_command
from lightning_prune.cli.config import (
    EXPECTED_ERRORS,
    UsageError,
    add_to_path,
    conf_dir,
    overrides_as_dict,
    root_cause,
)
from lightning_prune.cli.preflight import check
from lightning_prune.cli.quoting import quoted
from lightning_prune.cli.sweep_state import FREE_SUBDIR, continued
from lightning_prune.cli.train_help import shown_fitted
from lightning_prune.utils.hints import shortened, value_hint

if TYPE_CHECKING:
    from lightning_prune.reporting.live_bar import SweepTime
    from lightning_prune.reporting.run_folder import Summary

__all__ = ["conf_dir", "main"]

ERROR = "error.txt"  # as in reporting.run_folder, which imports torch


def job(config: DictConfig) -> float | tuple[float, ...] | None:
    """Run one training, and return its objective to the sweeper.

    In a sweep a failure is written into the run's folder, and the next run starts. A configuration that the sweep has
    finished before is not run again; one that it has begun goes on from its last checkpoint.
    """
    # Imported here, because torch and Lightning take seconds to import, which `--help` need not wait for.
    from lightning_prune.cli.sweep_job import sweep_job
    from lightning_prune.cli.sweep_stop import in_worker, run_in_worker

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    _quieten_lightning()
    if hydra_config.mode != RunMode.MULTIRUN:
        _run(folder, config, "")
        return None
    sweep = Path(hydra_config.sweep.dir)
    run = partial(sweep_job, sweep, folder, hydra_config.job.num, partial(_run, folder), config)
    if not in_worker(hydra_config):
        return run()
    if not hydra_config.job.chdir and Path(hydra_config.runtime.cwd).is_dir():
        os.chdir(hydra_config.runtime.cwd)  # a worker of Ray is elsewhere
    return run_in_worker(run, sweep, folder)


def _quieten_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric.utilities"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning prints itself that a process has died; Hydra's logger would print it again.
    logging.getLogger("lightning.fabric").propagate = False


def _run(
    folder: Path, config: DictConfig, prefix: str, sweep_time: SweepTime | None = None, announce: bool = True
) -> Summary | None:
    """Run one training; None if it has failed in a sweep, else errors are raised."""
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_prune.cli.interruption import Interruption, go_on_command
    from lightning_prune.cli.train import run
    from lightning_prune.reporting.figure import show_run
    from lightning_prune.reporting.run_folder import Summary

    hydra_config = HydraConfig.get()
    overrides = overrides_as_dict(hydra_config.overrides.task)
    choices = {str(group): str(option) for group, option in hydra_config.runtime.choices.items()}
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    try:
        summary = run(config, folder, overrides, choices, prefix, sweep_time=sweep_time, announce=announce)
    except Interruption:
        command = "" if sweeping else go_on_command(list(hydra_config.overrides.task), folder, _own_folders())
        again = f"; to go on: {command}" if command else ""
        line = f"{prefix}interrupted; results so far: {folder}{again}"
        rank_zero_only(print)(line, file=sys.stderr, flush=True)
        raise
    except Exception as error:
        failed = Summary("failed", overrides, choices, config.get("seed"), error=root_cause(error))
        _write_failure(folder, error, failed)
        _show_failure(folder, error, prefix, sweeping, value_hint(failed.error, hydra_config.overrides.task))
        return None
    rank_zero_only(show_run)(summary, folder, prefix, whole=config.table and not sweeping)
    return summary


def _own_folders() -> list[str]:
    """Return the flags of the command line that name folders with configurations of the user."""
    sources = HydraConfig.get().runtime.config_sources
    own = [source.path for source in sources if source.provider == "command-line"]
    return [word for path in own for word in ("--config-dir", path)]


def _write_failure(folder: Path, error: Exception, summary: Summary) -> None:
    from lightning_prune.utils.atomic import write_text

    summary.save(folder)
    write_text(folder / ERROR, "".join(traceback.format_exception(error)))


def _show_failure(folder: Path, error: Exception, prefix: str, sweeping: bool, hint: str) -> None:
    """Print the error in a sweep, else raise it, without traceback if it is an expected one."""
    message = "\n".join(
        [shortened(root_cause(error)), *filter(None, [hint]), f"(traceback: {folder / ERROR})"]
    )
    from lightning_prune.reporting.objective import ObjectiveError

    if sweeping:
        print(f"{prefix}failed: {message}", file=sys.stderr, flush=True)
        if isinstance(error, ObjectiveError):
            raise SystemExit(1)
    elif isinstance(error, EXPECTED_ERRORS) and not os.environ.get("HYDRA_FULL_ERROR"):
        raise SystemExit(message) from None
    else:
        raise error


OmegaConf.register_new_resolver(
    FREE_SUBDIR, lambda *numbers: sum(numbers), replace=True
)  # in the workers, too
hydra_main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)


def main() -> None:
    """Run the command that the first argument names, else ``train``."""
    try:
        _main("".join(sys.argv[1:2]), sys.argv[2:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # not a traceback


def _main(first: str, arguments: Sequence[str]) -> None:
    if first in COMMANDS:
        add_to_path(Path.cwd())
        run_command(first, arguments)
    elif first in ("--help", "-h", "help"):
        print(OVERVIEW, end="")
    elif first in ("--version", "-V"):
        print(f"lightning-prune {sys.modules['lightning_prune'].__version__}")  # Hydra has the flag, too
    else:
        if first == "train":
            del sys.argv[1]
        sys.argv[1:] = map(quoted, sys.argv[1:])  # which Hydra reads, too
        _train(sys.argv[1:])


def _train(arguments: Sequence[str]) -> None:
    """Check the command line, then hand it to Hydra.

    A sweep that ends early leaves its table, and says how to go on.
    """
    words = TrainArguments.parse(arguments)
    add_to_path(Path.cwd(), words.config_dir)
    try:
        if not words.asks:
            _check_words(words)
            if not os.environ.get("HYDRA_FULL_ERROR"):
                config = check(words)
                sys.argv += continued(words, config) if words.sweeps and config is not None else []
    except UsageError as error:
        print(f"lightning-prune: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    try:
        with _surroundings(words, arguments):
            hydra_main()
    except BaseException as error:
        if words.sweeps:
            from lightning_prune.cli.sweep import stop_running

            stop_running("interrupted" if getattr(error, "code", 130) in (130, 143) else "failed")
        raise


def _surroundings(words: TrainArguments, arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Return what a sweep needs around Hydra to be stopped, and help to fit the terminal."""
    if words.sweeps and not words.asks:
        from lightning_prune.cli.sweep_stop import stoppable_launchers

        return stoppable_launchers()
    return shown_fitted() if {"--help", "-h"} & {*arguments} else nullcontext()


def _check_words(words: TrainArguments) -> None:
    """Raise UsageError if the first word is neither a command nor an override."""
    first = words.overrides[0] if words.overrides else "="
    if "=" not in first and not first.startswith(("~", "+")):
        raise UsageError(unknown_command(first))
