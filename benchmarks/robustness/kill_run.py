"""The training run of :mod:`benchmarks.robustness.kill`, with all kinds of state that a resume must restore.

Dropout, augmentation by three random generators, a shuffled loader, batch norm, momentum, a plateau scheduler, and
statistics collected over an epoch, or a penalty and moving averages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import FilterPruningCallback, NetAdaptCallback, SlimmingCallback
from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.criteria import IPAD
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO

EPOCHS, BATCHES = 8, 5


class Stripes(Dataset):
    """Stripes of four kinds with noise from the generators of torch, NumPy and Python."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (torch.arange(144) % (index % 4 + 2) == 0).float().reshape(1, 12, 12)
        offset = 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002 - the global one must be restored
        image = image + 0.3 * torch.randn(image.shape) + offset
        return image, index % 4


class Classifier(L.LightningModule):
    """A small classifier with dropout, momentum and a plateau scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 4) of images (n, 1, 12, 12)."""
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss, on noisy images."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Return Adam, and a scheduler that reacts to every rise of the validation loss."""
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def shuffled(**arguments: Any) -> tuple[DataLoader, DataLoader]:
    """Return loaders for training (shuffled) and validation; ``arguments`` are for the former."""
    return DataLoader(Stripes(), 4, shuffle=True, **arguments), DataLoader(Stripes(), 4)


def pruning(**changes: Any) -> FilterPruningCallback:
    """Return a callback with both terms of IPAD, so that statistics are collected."""
    arguments = {
        "budget": {"macs": 0.5},
        "optimizer": "carry",
        "criterion": IPAD(omega=0.5),
        "verbose": False,
    }
    return FilterPruningCallback(**(arguments | changes))


def slimming(**changes: Any) -> SlimmingCallback:
    """Return a callback whose penalty rises over two epochs and ends three epochs before the last one."""
    arguments = {
        "budget": {"macs": 0.4},
        "rho": 0.005,
        "threshold": 0.9,
        "average_decay": 0.7,
        "shrink_at": 0.05,
        "end_epoch": EPOCHS - 3,
        "warmup_epochs": 2,
        "verbose": False,
    }
    return SlimmingCallback(**(arguments | changes))


def rounds() -> NetAdaptCallback:
    """Return a callback with three rounds at the end of the third epoch, scored on samples held out of training."""
    schedule = Rounds(rounds=3, decay=1.0, steps=2)
    return NetAdaptCallback({"macs": 0.5}, start_epoch=2, rounds=schedule, metric="val_loss", verbose=False)


#: name of a way of pruning -> function that returns its callbacks
PRUNINGS: dict[str, Callable[[], list[L.Callback]]] = {
    "filters": lambda: [pruning(compensate=False)],
    "compensation": lambda: [pruning(compensate=True)],
    "slimming": lambda: [slimming()],
    "averaged": lambda: [slimming(), EMAWeightAveraging(decay=0.7)],
    "rounds": lambda: [rounds()],
}


def fit(
    module: L.LightningModule,
    loaders: Sequence[DataLoader],
    callbacks: Sequence[L.Callback],
    resume: Path | None,
    plugin: CheckpointIO | None = None,
    accelerator: str = "cpu",
    **arguments: Any,
) -> dict[str, Any]:
    """Train from the beginning or from a checkpoint; return the final state.

    Args:
        module: the network, whose weights are initialised here.
        loaders: of training and validation data.
        callbacks: one of them prunes.
        resume: the checkpoint.
        plugin: writes checkpoints; by default ``AtomicCheckpointIO``.
        accelerator: of the trainer.
        arguments: of the trainer.
    """
    # Another seed for a resume: it must restore the state of the generators from the checkpoint.
    L.seed_everything(0 if resume is None else 12345, verbose=False)
    for layer in module.net:
        getattr(layer, "reset_parameters", bool)()
    trainer = L.Trainer(
        accelerator=accelerator,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        plugins=[plugin or AtomicCheckpointIO()],
        **arguments,
    )
    trainer.fit(module, *loaders, ckpt_path=resume)
    (pruner,) = (callback for callback in callbacks if isinstance(callback, PruningCallback))
    return {
        "weights": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "record": pruner.record.to_dict() if pruner.record else None,
        "state": untimed(pruner.state_dict()),
        "cuts": [(cut.epoch, cut.filters, cut.after) for cut in pruner.history],
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
    }


def untimed(state: Any) -> Any:
    """Return a state without its durations, which depend on the machine.

    Example:
        >>> untimed({"history": [{"epoch": 1, "seconds": 0.3}]})
        {'history': [{'epoch': 1}]}
    """
    if isinstance(state, dict):
        return {key: untimed(value) for key, value in state.items() if key != "seconds"}
    return [untimed(value) for value in state] if isinstance(state, list) else state


def same(a: Any, b: Any) -> bool:
    """Return whether two states are equal in every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
