"""An epoch in which nothing is learnt: what is to be pruned is looked at, and stays as it is (level 4)."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L

__all__ = ["FrozenEpoch"]


class FrozenEpoch(L.Callback):
    """Takes back all that the first epoch changes, before it is validated and before its end prunes.

    Its batches pass as in training, at a learning rate of 0, so that criteria see activations and gradients of the
    network as it is; then weights, running statistics, optimizer state and learning rates are put back.

    Example:
        >>> FrozenEpoch().state_key
        'FrozenEpoch'
    """

    def __init__(self) -> None:
        self._before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember everything, if this is the beginning."""
        if trainer.current_epoch == 0:
            self._before = copy.deepcopy(
                (pl_module.state_dict(), [each.state_dict() for each in trainer.optimizers])
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gradients count, steps do not."""
        for optimizer in trainer.optimizers if self._before else ():
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put everything back after the last batch."""
        if self._before and trainer.is_last_batch:
            weights, optimizers = self._before
            pl_module.load_state_dict(weights)
            for optimizer, state in zip(trainer.optimizers, optimizers, strict=True):
                optimizer.load_state_dict(state)
            self._before = None
