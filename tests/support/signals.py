"""A callback that sends its process a signal, as Ctrl-C and Slurm do."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L

__all__ = ["SignalAt", "SignalOnce"]


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


class SignalOnce(L.Callback):
    """Sends a signal by its name in the first batch of an epoch of the run with a seed, and never again.

    Args:
        name: of the signal.
        epoch: number of the epoch.
        mark: file that is written when the signal is sent.
        seed: of the run; None: any run.
    """

    def __init__(self, name: str, epoch: int, mark: str, seed: int | None = None) -> None:
        self.signal, self.epoch, self.mark, self.seed = signal.Signals[name], epoch, Path(mark), seed

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        of_run = self.seed is None or int(os.environ["PL_GLOBAL_SEED"]) == self.seed
        if trainer.current_epoch == self.epoch and of_run and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.signal)
