"""Callback for a first epoch that gathers statistics for pruning without changing the network."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L

__all__ = ["FrozenEpoch"]


class FrozenEpoch(L.Callback):
    """Restores the network at the end of the first epoch, before it is validated and pruned.

    The batches of the epoch run as in training, with a learning rate of 0, so that criteria gather activations and
    gradients of the trained network. After the last batch weights, running statistics, optimizer state and learning
    rates are set back to what they were before the epoch.

    Example:
        >>> FrozenEpoch().state_key
        'FrozenEpoch'
    """

    def __init__(self) -> None:
        self._saved: Any = None  # state dicts of the module and of its optimizers

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state of module and optimizers, unless training is resumed after the first epoch."""
        if trainer.current_epoch == 0:
            optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
            self._saved = copy.deepcopy((pl_module.state_dict(), optimizers))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rates to 0."""
        for optimizer in trainer.optimizers if self._saved else ():
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore module and optimizers after the last batch."""
        if self._saved and trainer.is_last_batch:
            weights, optimizers = self._saved
            pl_module.load_state_dict(weights)
            for optimizer, state in zip(trainer.optimizers, optimizers, strict=True):
                optimizer.load_state_dict(state)
            self._saved = None
