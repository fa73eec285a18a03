"""Base class of the LightningModules for segmentation and classification: network, steps and optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.mixin import DistillationMixin
from lightning_prune.utils.metrics import higher_is_better

__all__ = ["ADAM", "STAGES", "OptimizerFactory", "SchedulerFactory", "TaskModule"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

STAGES = ("train", "val", "test")
ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3)


def _check_plateau(scheduler: LRScheduler, monitor: str) -> None:
    """Raise ValueError if the scheduler lowers the learning rate while a score rises, its default mode."""
    falls = isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "min"
    if falls and higher_is_better(monitor):
        raise ValueError(f"monitor={monitor!r} should rise: give ReduceLROnPlateau mode='max'")


class TaskModule(DistillationMixin):
    """LightningModule that trains ``net``; a subclass computes loss and metrics of a batch in :meth:`step`.

    Only ``self.net`` refers to the network's parameters, so that a callback may replace ``p.data``.

    Args:
        net: network that maps images ``(n, c, h, w)`` to logits.
        num_classes: number of logits, at least 2.
        optimizer: called with the parameters that require gradients.
        scheduler: called with the optimizer, stepped once per epoch.
        monitor: metric for ``ReduceLROnPlateau``. One that should rise requires its ``mode="max"``.
        example_input_shape: shape of ``example_input_array``, with the batch dimension; None: there is none.
        distillation: options of distillation from a teacher.

    Raises:
        ValueError: ``num_classes`` is below 2.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        monitor: str,
        example_input_shape: Sequence[int] | None,
        distillation: Distillation | None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: one object needs 2 classes, itself and background")
        self.net = net
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.monitor = monitor
        self.distillation = distillation
        if example_input_shape is not None:
            generator = torch.Generator().manual_seed(0)
            self.example_input_array = torch.rand(tuple(example_input_shape), generator=generator)

    @abstractmethod
    def step(self, batch: tuple[Tensor, ...], stage: str) -> Tensor:
        """Return the loss of one batch, and update and log the metrics of the stage."""

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of images ``(n, c, h, w)``, classes along dimension 1."""
        return self.net(image)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of one batch, with gradient."""
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        return self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        return self.step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class numbers for a batch of images, with or without targets."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch).argmax(1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of the parameters that require gradients, and its scheduler with ``monitor``."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        _check_plateau(scheduler, self.monitor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}

    def _log_loss(self, loss: Tensor, stage: str, size: int) -> None:
        bar, sync = stage != "test", stage != "train"
        self.log(
            f"{stage}/loss", loss, on_step=False, on_epoch=True, prog_bar=bar, sync_dist=sync, batch_size=size
        )
