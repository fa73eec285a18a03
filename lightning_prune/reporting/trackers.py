"""Experiment trackers of a run: they get its configuration at the start, and are closed at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from lightning_prune.reporting.trackio import TrackioLogger

__all__ = ["describe_run", "finish_trackers"]


def describe_run(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Send the configuration of a run to the trackers among its loggers; files of the run have it already."""
    for logger in loggers:
        if isinstance(logger, MLFlowLogger | WandbLogger | TrackioLogger):
            logger.log_hyperparams(config)


def finish_trackers(loggers: Iterable[Logger]) -> None:
    """Close the runs that Lightning leaves open: the next run of a sweep would write into them."""
    loggers = list(loggers)
    for logger in loggers:
        if isinstance(logger, TrackioLogger):
            logger.close()
    if any(isinstance(logger, WandbLogger) for logger in loggers) and "wandb" in sys.modules:
        sys.modules["wandb"].finish()
