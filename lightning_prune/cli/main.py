"""``lightning-prune``: train, prune while training, test; alone or as a sweep (level 5)."""

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

from lightning_prune.cli.config import EXPECTED_ERRORS, overrides_as_dict, conf_dir, root_cause
from lightning_prune.reporting.run_folder import ERROR, Summary

__all__ = ["conf_dir", "main"]


def job(config: DictConfig) -> None:
    """One run. In a sweep a failure is written down, and the other runs go on."""
    from lightning_prune.cli.train import run
    from lightning_prune.reporting.figure import show_run

    given = HydraConfig.get()
    folder, sweeping = Path(given.runtime.output_dir), given.mode == RunMode.MULTIRUN
    overrides = overrides_as_dict(given.overrides.task)
    choices = {str(group): str(option) for group, option in given.runtime.choices.items()}
    prefix = f"#{given.job.num} │ " if sweeping else ""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        summary = run(config, folder, overrides, choices, prefix)
    except Exception as error:
        failed = Summary("failed", overrides, choices, config.get("seed"), error=root_cause(error))
        _write_failure(folder, error, failed)
        _show_failure(folder, error, prefix, go_on=sweeping)
    else:
        show_run(summary, folder, prefix, whole=config.table and not sweeping)


def _write_failure(folder: Path, error: Exception, summary: Summary) -> None:
    summary.save(folder)
    (folder / ERROR).write_text("".join(traceback.format_exception(error)))


def _show_failure(folder: Path, error: Exception, prefix: str, go_on: bool) -> None:
    message = f"{root_cause(error)}\n(traceback: {folder / ERROR})"
    if go_on:
        print(f"{prefix}failed: {message}", file=sys.stderr, flush=True)
    elif isinstance(error, EXPECTED_ERRORS) and not os.environ.get("HYDRA_FULL_ERROR"):
        raise SystemExit(message) from None
    else:
        raise error


hydra_main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)


def main() -> None:
    """``export``, ``latency``, ``sensitivity`` and the like are commands of their own; all else is for Hydra."""
    if sys.argv[1:2] == ["export"]:
        from lightning_prune.cli.export import main as export_main

        export_main(sys.argv[2:])
    elif sys.argv[1:2] == ["latency"]:
        from lightning_prune.cli.latency import main as latency_main

        latency_main(sys.argv[2:])
    elif sys.argv[1:2] in (["netadapt"], ["oneshot"]):
        from lightning_prune.cli.prune import main as prune_main

        prune_main(sys.argv[1], sys.argv[2:])
    elif sys.argv[1:2] == ["sensitivity"]:
        from lightning_prune.cli.sensitivity import main as sensitivity_main

        sensitivity_main(sys.argv[2:])
    else:
        hydra_main()
