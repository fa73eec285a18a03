"""Batches as Lightning's loops would hand them to a step, outside of these loops (level 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader

from lightning_prune.batches import switched

__all__ = ["Indexed", "held_batches", "moved", "train_batches"]

#: a batch, its number, and that of its loader; None: there is but one
Indexed = tuple[Any, int, int | None]


def moved(trainer: L.Trainer, batch: Any, device: torch.device, loader: int = 0) -> Any:
    """A batch on ``device``, after all that precision, module and data module do to it on its way."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, device, dataloader_idx=loader)


def train_batches(trainer: L.Trainer, device: torch.device) -> Iterator[Any]:
    """One pass over the training data, of one loader or several, as far as an epoch goes."""
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return
    for batch, number, _ in CombinedLoader(combined.iterables, combined._mode):
        if number >= trainer.num_training_batches:
            break
        yield moved(trainer, batch, device)


def held_batches(
    trainer: L.Trainer, loaders: Any, device: torch.device, number: int | None = None
) -> list[Indexed]:
    """One pass over one loader or several, one after the other, as validation sees them, or ``number`` of each."""
    combined = CombinedLoader(loaders, "sequential")
    most = math.inf if number is None else number
    limits = (
        trainer.num_val_batches
        if loaders is trainer.val_dataloaders
        else [math.inf] * len(combined.flattened)
    )
    combined.limits = [min(limit, most) for limit in limits]
    several = len(combined.flattened) > 1
    with _validating(trainer):
        return [
            (moved(trainer, batch, device, loader), index, loader if several else None)
            for batch, index, loader in combined
        ]


@contextmanager
def _validating(trainer: L.Trainer) -> Iterator[None]:
    """Hooks that augment while training let these batches be."""
    before, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
    try:
        with switched(trainer.lightning_module, lambda module: False):
            yield
    finally:
        trainer.state.stage = before
