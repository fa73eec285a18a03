"""A callback that sends its process a signal, as Ctrl-C and Slurm do."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning as L

__all__ = ["SignalAt"]


class SignalAt(L.Callback):
    """Sends a signal by its name in the first batch of an epoch, or when testing begins."""

    def __init__(self, name: str, epoch: int | None) -> None:
        self.signal, self.epoch = signal.Signals[name], epoch

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), self.signal)

    def on_test_start(self, *_: Any) -> None:
        if self.epoch is None:
            os.kill(os.getpid(), self.signal)
