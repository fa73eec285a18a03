"""Experiment trackers of a run: they get its configuration at the start, and are closed at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

__all__ = ["describe_run", "finish_trackers"]


def describe_run(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Send the configuration of a run to the trackers among its loggers; files of the run have it already."""
    for logger in loggers:
        if isinstance(logger, MLFlowLogger | WandbLogger):
            logger.log_hyperparams(config)


def finish_trackers(loggers: Iterable[Logger]) -> None:
    """Close the run of Weights & Biases, which Lightning leaves open: the next run of a sweep would write into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers) and "wandb" in sys.modules:
        sys.modules["wandb"].finish()
