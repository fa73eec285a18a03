"""Checks of what a run finds around it, before torch is imported: packages, servers, and a folder to write into."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from socket import create_connection
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.cli.config import UsageError

__all__ = ["check_installed", "check_writable"]

#: class of a data set -> the package that its files come with, and what to tell who does not have it
NEEDED = {
    "lightning_prune.data.BrainSlices": (
        "nilearn",
        "the example data, slices of a brain, come with an extra package. Install it:\n"
        "  pip install 'lightning-prune[demo]'\n"
        "or choose other data, such as images and masks of your own:\n"
        "  lightning-prune data=folder data.root=DIR task.num_classes=5",
    )
}
#: class of a logger -> the package that it writes with, which is the name of its extra, too
TRACKERS = {
    "lightning.pytorch.loggers.MLFlowLogger": "mlflow",
    "lightning.pytorch.loggers.WandbLogger": "wandb",
    "lightning_prune.TrackioLogger": "trackio",
}


def check_installed(config: DictConfig) -> None:
    """Raise UsageError if data or a logger need a package that is not installed, or a server that does not answer."""
    target = str(OmegaConf.select(config, "data._target_"))
    package, message = NEEDED.get(target, ("", ""))
    if package and find_spec(package) is None:
        raise UsageError(message)
    for logger in (config.get("logger") or {}).values():
        _check_tracker(logger)


def _check_tracker(logger: DictConfig) -> None:
    """Raise UsageError if the package of a logger is not installed, or its server does not answer."""
    package = TRACKERS.get(str(logger.get("_target_")), "")
    if package and find_spec(package) is None:
        raise UsageError(
            f"logger={package} needs a package that is not installed:\n  pip install 'lightning-prune[{package}]'"
        )
    address = urlsplit(str(logger.get("tracking_uri") if package == "mlflow" else ""))
    if address.scheme not in ("http", "https") or address.hostname is None:
        return
    try:
        port = address.port or {"http": 80, "https": 443}[address.scheme]
        create_connection((address.hostname, port), timeout=5).close()
    except OSError as error:  # the client of MLflow would try again for minutes
        raise UsageError(
            f"no MLflow server answers at {address.geturl()} ({error}).\nStart one: mlflow server --port {port}"
        ) from error


def check_writable(config: DictConfig, kind: str) -> None:
    """Raise UsageError if the folder of a run or sweep cannot be made, which Hydra would show as a traceback."""
    key = f"hydra.{kind}.dir"
    try:
        folder = Path(OmegaConf.select(config, key)).absolute()
    except (OmegaConfBaseException, TypeError):
        return  # the folder depends on the run
    # Path.exists would raise PermissionError.
    above = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not above.is_dir():
        raise UsageError(f"results cannot be written to {folder}, because {above} is a file: {key}=FOLDER")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"results cannot be written to {folder}: there is no permission to write into {above}.\n"
            f"Start the command in another folder, or give one: {key}=FOLDER"
        )
