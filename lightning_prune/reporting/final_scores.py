"""Scores of the final network of a run, on the test set and on the validation set."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["has_test_set", "scores_of_test", "scores_of_validation"]


def has_test_set(data: Any) -> bool:
    """Return whether a data module has a test set, by its ``has_samples`` if there is one, else by its test loader.

    Example:
        >>> has_test_set(L.LightningDataModule())
        False
    """
    if callable(has_samples := getattr(data, "has_samples", None)):
        return bool(has_samples("test"))
    return is_overridden("test_dataloader", data, L.LightningDataModule)


def scores_of_test(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule
) -> dict[str, float]:
    """Return the metrics of a network on the test set, without ``"test/"``; {} if there is no test set."""
    if not has_test_set(data):
        return {}
    rows = trainer.test(module, data, verbose=False)
    return {name.removeprefix("test/"): float(value) for row in rows for name, value in row.items()}


def scores_of_validation(
    trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule
) -> dict[str, float]:
    """Return the metrics of a network on the validation set, without ``"val/"``; {} if there is no such set.

    A sweep chooses by them. Those of the last epoch are from before its cut, and of another network if the best one
    was loaded since.
    """
    if not sum(map(bool, trainer.num_val_batches)):
        return {}
    # The loggers have the scores of each epoch, and this is none.
    loggers, trainer.loggers = trainer.loggers, []
    try:
        rows = trainer.validate(module, data, verbose=False)
    finally:
        trainer.loggers = loggers
    return {name.removeprefix("val/"): float(value) for row in rows for name, value in row.items()}
