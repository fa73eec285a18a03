"""The metrics of each epoch of a run: kept in memory, and printed as one line per epoch and one per cut."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_prune.callbacks.method_callback import pruning_callbacks
from lightning_prune.pruning.cut_summary import CutSummary
from lightning_prune.reporting.csv_log import ResumableCSVLogger
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.metrics import SCORE_LABELS
from lightning_prune.utils.terminal import fitted

__all__ = ["EpochHistory", "EpochLines"]

CUT = "  ✂ "  # begins the line of a cut


class EpochHistory(Logger):
    """Logger that keeps every metric that is logged once per epoch, for the report of the run.

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
        """One row per epoch: metric -> value, with the key ``epoch``."""
        return [{"epoch": epoch, **row} for epoch, row in sorted(self._rows.items())]

    def add(self, curves: Iterable[Mapping[str, float]]) -> None:
        """Add epochs that were trained before this process, from the ``curves`` of then."""
        for row in curves:
            self.log_metrics(row)

    @property
    def name(self) -> str:
        """Return ``"history"``; Lightning requires a name."""
        return "history"

    @property
    def version(self) -> str:
        """Return an empty version; Lightning requires one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep the metrics of an epoch, except those of the test set."""
        row = {name: float(value) for name, value in metrics.items() if not name.startswith("test/")}
        epoch = int(row.pop("epoch", -1))
        if row and epoch >= 0:
            self._rows.setdefault(epoch, {}).update(row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters: the run's configuration file has them."""


class EpochLines(L.Callback):
    """Callback that prints one line per epoch and one per cut. Put it after the pruning callback.

    Args:
        prefix: text before every line, to distinguish parallel runs.
        history: metrics of the epochs, which checkpoints keep for the report of a run that goes on.
    """

    def __init__(self, prefix: str = "", history: EpochHistory | None = None) -> None:
        self.prefix, self.history = prefix, history or EpochHistory()
        self._start = 0.0
        self._cuts_before = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics of the epochs so far."""
        return {"curves": self.history.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the metrics of the epochs before the checkpoint."""
        self.history.add(state_dict["curves"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the start time of the epoch."""
        self._start = time.perf_counter()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch."""
        seconds = time.perf_counter() - self._start
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        logged = {name: value for name, value in scores.items() if not name.endswith("_step")}
        # The loggers get some metrics only after a checkpoint was written.
        self.history.log_metrics({"epoch": trainer.current_epoch, **logged})
        line = epoch_line(trainer.current_epoch, trainer.max_epochs, seconds, scores)
        print(fitted(self.prefix + line, " " * len(self.prefix)), flush=True)
        self._print_cuts(trainer)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note which cuts were made before, and go on with the CSV log of a run that is resumed."""
        self._cuts_before = len(_cuts(trainer))
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger) and trainer.ckpt_path:
                logger.resume(trainer.ckpt_path, self.history.curves)

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Print a line for each cut within the epoch."""
        self._print_cuts(trainer)

    def _print_cuts(self, trainer: L.Trainer) -> None:
        """Print a line for each cut that has none yet."""
        cuts = _cuts(trainer)
        for cut in cuts[self._cuts_before :]:
            print(fitted(f"{self.prefix}{CUT}{cut_line(cut)}", " " * len(self.prefix + CUT)), flush=True)
        self._cuts_before = len(cuts)


def epoch_line(epoch: int, epochs: int | None, seconds: float, scores: Mapping[str, float]) -> str:
    """Return the line of an epoch: number, seconds and scores.

    Args:
        epoch: number from 0.
        epochs: number of epochs of the training; None or -1 if there is no limit.
        seconds: duration of the epoch.
        scores: metric -> value; ``train/loss`` and ``val/miou`` or ``val/accuracy`` are used.

    Example:
        >>> epoch_line(1, 20, 5.23, {"train/loss": 0.4, "val/miou": 0.7})
        'epoch  2/20 ·  5.2 s · loss 0.4000 · val mIoU 0.7000'
    """
    labels = {"train/loss": "loss"} | {f"val/{name}": f"val {label}" for name, label in SCORE_LABELS.items()}
    parts = [f"{label} {scores[name]:.4f}" for name, label in labels.items() if name in scores]
    total = str(epochs) if epochs and epochs > 0 else "?"
    return " · ".join([f"epoch {epoch + 1:>{len(total)}}/{total}", f"{seconds:4.1f} s", *parts])


def _cuts(trainer: L.Trainer) -> list[CutSummary]:
    """Return the cuts of all pruning callbacks so far."""
    return [cut for callback in pruning_callbacks(trainer) for cut in callback.history]


def cut_line(cut: CutSummary) -> str:
    """Return how many filters a cut removed, the shares of the resources that are left, and what the repair achieved.

    Example:
        >>> cut_line(CutSummary(1, 20, 3, {"macs": 100}, {"macs": 90}, {"macs": 0.9}, "amount", 0.1))
        'cut 20 filters: 90.0 % of MACs left'
    """
    labels = {"macs": "MACs", "params": "parameters"}
    shares = [f"{100 * share:.1f} % of {labels.get(name, name)}" for name, share in cut.share.items()]
    return f"cut {counted(cut.filters, 'filter')}: {', '.join(shares)} left{cut.repair_line}"
