"""``lightning-prune``: train, prune while training, and test; one run or a sweep.

``lightning-prune KEY=VALUE ...`` is a Hydra application. ``export``, ``latency``, ``netadapt``, ``oneshot`` and
``sensitivity`` are commands of their own.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_prune.cli.config import EXPECTED_ERRORS, conf_dir, overrides_as_dict, root_cause
from lightning_prune.reporting.run_folder import ERROR, Summary
from lightning_prune.serialization.atomic import write_text

__all__ = ["conf_dir", "main"]


def job(config: DictConfig) -> None:
    """Run one training. In a sweep a failure is written into the run's folder, and the next run starts."""
    # Imported here and below, because Lightning takes seconds to import, which `--help` need not wait for.
    from lightning_prune.cli.interruption import Interruption, go_on_command
    from lightning_prune.cli.train import run
    from lightning_prune.reporting.figure import show_run

    hydra_config = HydraConfig.get()
    folder, sweeping = Path(hydra_config.runtime.output_dir), hydra_config.mode == RunMode.MULTIRUN
    overrides = overrides_as_dict(hydra_config.overrides.task)
    choices = {str(group): str(option) for group, option in hydra_config.runtime.choices.items()}
    prefix = f"#{hydra_config.job.num} │ " if sweeping else ""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        summary = run(config, folder, overrides, choices, prefix)
    except Interruption:
        command = go_on_command(list(hydra_config.overrides.task), folder)
        print(
            f"{prefix}interrupted; results so far: {folder}; to go on: {command}", file=sys.stderr, flush=True
        )
        raise
    except Exception as error:
        failed = Summary("failed", overrides, choices, config.get("seed"), error=root_cause(error))
        _write_failure(folder, error, failed)
        _show_failure(folder, error, prefix, sweeping)
    else:
        show_run(summary, folder, prefix, whole=config.table and not sweeping)


def _write_failure(folder: Path, error: Exception, summary: Summary) -> None:
    summary.save(folder)
    write_text(folder / ERROR, "".join(traceback.format_exception(error)))


def _show_failure(folder: Path, error: Exception, prefix: str, sweeping: bool) -> None:
    """Print the error in a sweep, else raise it, without traceback if it is an expected one."""
    message = f"{root_cause(error)}\n(traceback: {folder / ERROR})"
    if sweeping:
        print(f"{prefix}failed: {message}", file=sys.stderr, flush=True)
    elif isinstance(error, EXPECTED_ERRORS) and not os.environ.get("HYDRA_FULL_ERROR"):
        raise SystemExit(message) from None
    else:
        raise error


hydra_main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)


def main() -> None:
    """Run the command that the first argument names, else the Hydra application."""
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if command == "export":
        from lightning_prune.cli.export import main as export_main

        export_main(arguments)
    elif command == "latency":
        from lightning_prune.cli.latency import main as latency_main

        latency_main(arguments)
    elif command in ("netadapt", "oneshot"):
        from lightning_prune.cli.prune import main as prune_main

        prune_main(command, arguments)
    elif command == "sensitivity":
        from lightning_prune.cli.sensitivity import main as sensitivity_main

        sensitivity_main(arguments)
    else:
        hydra_main()
