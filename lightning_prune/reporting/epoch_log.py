"""What a run shows while it trains, and what it remembers of its epochs (level 4)."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_prune.callbacks.pruning import pruning_callbacks
from lightning_prune.pruning.cut_summary import CutSummary

__all__ = ["EpochHistory", "EpochLines"]


class EpochHistory(Logger):
    """Keeps everything that is logged once per epoch, whatever other loggers there are.

    Example:
        >>> history = EpochHistory()
        >>> history.log_metrics({"epoch": 0, "val/miou": 0.5}, step=9)
        >>> history.log_metrics({"epoch": 0, "train/loss": 1.0}, step=9)
        >>> history.curves
        [{'epoch': 0, 'val/miou': 0.5, 'train/loss': 1.0}]
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[int, dict[str, float]] = {}

    @property
    def curves(self) -> list[dict[str, float]]:
        """One row per epoch: metric -> value."""
        return [{"epoch": epoch, **row} for epoch, row in sorted(self._rows.items())]

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "history"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep what belongs to an epoch; the test set's scores are no part of a curve."""
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith("test/")}
        epoch = int(kept.pop("epoch", -1))
        if kept and epoch >= 0:
            self._rows.setdefault(epoch, {}).update(kept)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in the configuration."""


class EpochLines(L.Callback):
    """Prints one line per epoch. Comes after the pruning callback, so that it can tell of the cut.

    Args:
        prefix: before every line, to tell parallel runs apart.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        seconds = time.perf_counter() - self.start
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        line = epoch_line(trainer.current_epoch, trainer.max_epochs, seconds, scores)
        print(self.prefix + line + _cut(trainer), flush=True)


def epoch_line(epoch: int, epochs: int | None, seconds: float, scores: Mapping[str, float]) -> str:
    """One line about an epoch.

    Example:
        >>> epoch_line(1, 20, 5.23, {"train/loss": 0.4, "val/miou": 0.7})
        'epoch  2/20 ·  5.2 s · loss 0.4000 · val mIoU 0.7000'
    """
    shown = {"train/loss": "loss", "val/miou": "val mIoU"}
    parts = [f"{label} {scores[name]:.4f}" for name, label in shown.items() if name in scores]
    total = str(epochs) if epochs and epochs > 0 else "?"
    return " · ".join([f"epoch {epoch + 1:>{len(total)}}/{total}", f"{seconds:4.1f} s", *parts])


def _cut(trainer: L.Trainer) -> str:
    """What the pruning callbacks removed at the end of this epoch."""
    cuts = [cut for callback in pruning_callbacks(trainer) for cut in callback.history]
    return "".join(f" · {cut_line(cut)}" for cut in cuts if cut.epoch == trainer.current_epoch)


def cut_line(cut: CutSummary) -> str:
    """What one cut removed, and what is left.

    Example:
        >>> cut_line(Cut(1, 20, 3, {"macs": 100}, {"macs": 90}, {"macs": 0.9}, "amount", 0.1))
        'cut 20 filters: 90.0 % of MACs left'
    """
    labels = {"macs": "MACs", "params": "parameters"}
    left = ", ".join(
        f"{share:.1%}".replace("%", " %") + f" of {labels.get(r, r)}" for r, share in cut.share.items()
    )
    return f"cut {cut.filters} filters: {left} left"
