"""``lightning-prune``: train, prune while training, test; alone or as a sweep (level 5)."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.runs import ERROR, Summary

__all__ = ["conf_dir", "main"]

#: what a wrong configuration or wrong data raises; anything else is shown with its traceback
EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    NotImplementedError,
    OmegaConfBaseException,
    InstantiationException,
)


def conf_dir() -> Path:
    """The folder of configurations: inside the installed package, else at the top of the checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no conf/config.yaml in {package} or {package.parent}: reinstall lightning-prune"
    )


def as_dict(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides as key -> value.

    Example:
        >>> as_dict(["prune.criterion.omega=0", "+a=b=c", "~x"])
        {'prune.criterion.omega': '0', 'a': 'b=c', 'x': ''}
    """
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def reason(error: BaseException) -> str:
    """What an error that others wrapped was at first, and at which key of the configuration.

    Example:
        >>> try:
        ...     raise InstantiationException("...\\nfull_key: prune.criterion") from ValueError("omega is 2")
        ... except InstantiationException as error:
        ...     reason(error)
        'prune.criterion: ValueError: omega is 2'
    """
    lines = str(error).splitlines() if isinstance(error, InstantiationException) else []
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    while error.__cause__ is not None:
        error = error.__cause__
    return ": ".join([*keys, type(error).__name__, *filter(None, [str(error)])])


def job(config: DictConfig) -> None:
    """One run. In a sweep a failure is written down, and the other runs go on."""
    from lightning_prune.experiment import run  # late: `--help` need not wait for Lightning
    from lightning_prune.report import show_run

    given = HydraConfig.get()
    folder, sweeping = Path(given.runtime.output_dir), given.mode == RunMode.MULTIRUN
    overrides = as_dict(given.overrides.task)
    choices = {str(group): str(option) for group, option in given.runtime.choices.items()}
    prefix = f"#{given.job.num} │ " if sweeping else ""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        summary = run(config, folder, overrides, choices, prefix)
    except Exception as error:
        failed = Summary("failed", overrides, choices, config.get("seed"), error=reason(error))
        _write_failure(folder, error, failed)
        _show_failure(folder, error, prefix, go_on=sweeping)
    else:
        show_run(summary, folder, prefix, whole=config.table and not sweeping)


def _write_failure(folder: Path, error: Exception, summary: Summary) -> None:
    summary.save(folder)
    (folder / ERROR).write_text("".join(traceback.format_exception(error)))


def _show_failure(folder: Path, error: Exception, prefix: str, go_on: bool) -> None:
    message = f"{reason(error)}\n(traceback: {folder / ERROR})"
    if go_on:
        print(f"{prefix}failed: {message}", file=sys.stderr, flush=True)
    elif isinstance(error, EXPECTED) and not os.environ.get("HYDRA_FULL_ERROR"):
        raise SystemExit(message) from None
    else:
        raise error


hydra_main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)


def main() -> None:
    """``export``, ``latency``, ``sensitivity`` and the like are commands of their own; all else is for Hydra."""
    if sys.argv[1:2] == ["export"]:
        from lightning_prune.export_run import main as export_main

        export_main(sys.argv[2:])
    elif sys.argv[1:2] == ["latency"]:
        from lightning_prune.latency_run import main as latency_main

        latency_main(sys.argv[2:])
    elif sys.argv[1:2] in (["netadapt"], ["oneshot"]):
        from lightning_prune.prune_run import main as prune_main

        prune_main(sys.argv[1], sys.argv[2:])
    elif sys.argv[1:2] == ["sensitivity"]:
        from lightning_prune.sensitivity_run import main as sensitivity_main

        sensitivity_main(sys.argv[2:])
    else:
        hydra_main()
