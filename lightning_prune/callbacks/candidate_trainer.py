"""Replacement for the trainer, its loggers and ``log`` in modules whose candidates are trained without a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CandidateTrainer", "LoggedValues", "NullLogger"]

#: attributes copied from the trainer
COPIED = (
    "current_epoch",
    "global_step",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "num_training_batches",
    "num_val_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "log_every_n_steps",
    "fast_dev_run",
    "overfit_batches",
)


class NullLogger:
    """A logger that accepts every attribute and call, and stores nothing.

    Example:
        >>> _ = NullLogger().experiment.add_image("input", None)
    """

    def __getattr__(self, name: str) -> NullLogger:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NullLogger:
        """Accept any arguments."""
        return self


class CandidateTrainer:
    """The attributes of a trainer that a module's steps may read, without loops, loaders and optimizers.

    Args:
        trainer: its progress and settings are copied.

    Attributes:
        training: whether a candidate is trained; otherwise it is validated.

    Example:
        >>> real = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> trainer = CandidateTrainer(real)
        >>> trainer.max_epochs, trainer.training
        (3, True)
        >>> trainer.optimizers
        Traceback (most recent call last):
        AttributeError: candidates of a search are trained without the Trainer and have no trainer.optimizers
    """

    def __init__(self, trainer: L.Trainer) -> None:
        for name in COPIED:
            setattr(self, name, getattr(trainer, name))
        self.world_size, self.global_rank, self.local_rank, self.is_global_zero = 1, 0, 0, True
        self.sanity_checking = self.testing = self.predicting = False
        self.progress_bar_callback = None
        self.logger, self.loggers = NullLogger(), [NullLogger()]
        self.precision_plugin = Precision()
        self.training = True

    @property
    def validating(self) -> bool:
        """Whether a candidate is validated."""
        return not self.training

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"candidates of a search are trained without the Trainer and have no trainer.{name}"
        )


class LoggedValues:
    """Replacement for ``LightningModule.log``: collects values by name and reduces them over all calls.

    Means are weighted by batch size. Objects of torchmetrics are computed at the end.

    Attributes:
        size: size of the present batch, for calls without ``batch_size``.
        loader: index of the batch's loader, which is appended to names; None if there is one loader.

    Example:
        >>> logged = LoggedValues()
        >>> logged("loss", 1.0, batch_size=1), logged("loss", torch.tensor(4.0), batch_size=2)
        (None, None)
        >>> logged.value("loss")
        3.0
    """

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[float, float]]] = {}
        self.reduce: dict[str, Any] = {}
        self.metrics: dict[str, Metric] = {}
        self.size = 1
        self.loader: int | None = None

    def __call__(
        self,
        name: str,
        value: Any,
        *args: Any,
        batch_size: int | None = None,
        reduce_fx: str | Callable[[Tensor], Tensor] = "mean",
        add_dataloader_idx: bool = True,
        **kwargs: Any,
    ) -> None:
        """Store a value; the arguments are those of ``LightningModule.log``."""
        if self.loader is not None and add_dataloader_idx:
            name = f"{name}/dataloader_idx_{self.loader}"
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        self.values.setdefault(name, []).append((float(value), float(batch_size or self.size)))
        self.reduce[name] = getattr(torch, reduce_fx) if isinstance(reduce_fx, str) else reduce_fx

    def value(self, name: str) -> float:
        """Return what was logged under a name, reduced by its ``reduce_fx``.

        Raises:
            ValueError: nothing was logged under this name.
        """
        if name in self.metrics:
            return float(self.metrics[name].compute())
        if name not in self.values:
            names = ", ".join([*self.values, *self.metrics]) or "nothing"
            raise ValueError(f"validation logs no {name!r}, but {names}: set metric= to one of them")
        values, sizes = zip(*self.values[name], strict=True)
        if self.reduce[name] is torch.mean:
            return sum(v * s for v, s in zip(values, sizes, strict=True)) / sum(sizes)
        return float(self.reduce[name](torch.tensor(values)))
