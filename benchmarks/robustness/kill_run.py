"""The training run that :mod:`benchmarks.robustness.kill` kills: it has everything that must go on after a resume.

Dropout, augmentation by three random generators, a shuffled loader, batch norm, momentum, a plateau scheduler, and
statistics gathered over an epoch, or a penalty and moving averages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import FilterPruningCallback, NetAdaptCallback, SlimmingCallback
from lightning_prune.criteria import IPAD
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO

EPOCHS, BATCHES = 8, 5


class Stripes(Dataset):
    """Stripes of four kinds in noise, augmented by all the random generators there are."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (torch.arange(144) % (index % 4 + 2) == 0).float().reshape(1, 12, 12)
        drawn = 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002 - the global one is to be restored
        image = image + 0.3 * torch.randn(image.shape) + drawn
        return image, index % 4


class Classifier(L.LightningModule):
    """Small, with dropout, momentum and a plateau scheduler."""

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
        """Logits (n, 4)."""
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss, on noisy images."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Adam, and a scheduler that reacts to every rise of the validation loss."""
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def shuffled(**arguments: Any) -> tuple[DataLoader, DataLoader]:
    """Loaders for training and validation."""
    return DataLoader(Stripes(), 4, shuffle=True, **arguments), DataLoader(Stripes(), 4)


def pruning(**changes: Any) -> FilterPruningCallback:
    """Both terms of IPAD, so that statistics are gathered."""
    arguments = {
        "budget": {"macs": 0.5},
        "optimizer": "carry",
        "criterion": IPAD(omega=0.5),
        "verbose": False,
    }
    return FilterPruningCallback(**(arguments | changes))


def slimming(**changes: Any) -> SlimmingCallback:
    """Scales fade from the second epoch on; the last of them are cut two epochs before the end."""
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
    """Three rounds at the end of the third epoch, judged on samples that are taken out of training."""
    schedule = Rounds(rounds=3, decay=1.0, steps=2)
    return NetAdaptCallback({"macs": 0.5}, start_epoch=2, rounds=schedule, metric="val_loss", verbose=False)


#: what prunes, and what else follows the network
PRUNINGS: dict[str, Callable[[], list[L.Callback]]] = {
    "filters": lambda: [pruning()],
    "slimming": lambda: [slimming()],
    "averaged": lambda: [slimming(), EMAWeightAveraging(decay=0.7)],
    "rounds": lambda: [rounds()],
}


def fit(
    module: L.LightningModule,
    loaders: Sequence[DataLoader],
    callbacks: Sequence[L.Callback],
    resume: Path | None,
    **arguments: Any,
) -> dict[str, Any]:
    """One run, from its beginning or from a checkpoint; everything that there is at its end."""
    L.seed_everything(0 if resume is None else 12345, verbose=False)  # what resumes gets no help from seeds
    for layer in module.net:
        getattr(layer, "reset_parameters", bool)()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(held, ModelCheckpoint) for held in callbacks),
        plugins=[AtomicCheckpointIO()],
        **arguments,
    )
    trainer.fit(module, *loaders, ckpt_path=resume)
    (callback,) = (held for held in callbacks if isinstance(held, FilterPruningCallback))
    return {
        "weights": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "record": callback.record.to_dict() if callback.record else None,
        "state": untimed(callback.state_dict()),
        "cuts": [(cut.epoch, cut.filters, cut.after) for cut in callback.history],
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
    }


def untimed(state: Any) -> Any:
    """Without what depends on the machine: how long things took.

    Example:
        >>> untimed({"history": [{"epoch": 1, "seconds": 0.3}]})
        {'history': [{'epoch': 1}]}
    """
    if isinstance(state, dict):
        return {key: untimed(value) for key, value in state.items() if key != "seconds"}
    return [untimed(value) for value in state] if isinstance(state, list) else state


def same(a: Any, b: Any) -> bool:
    """Equal, bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
