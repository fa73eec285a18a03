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
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.mixin import DistillationMixin
from lightning_prune.utils.metrics import higher_is_better

__all__ = [
    "ADAM",
    "STAGES",
    "OptimizerFactory",
    "SchedulerFactory",
    "TaskModule",
    "check_names",
    "summed_confusion",
]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

STAGES = ("train", "val", "test")
ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3)


def check_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return the names of the classes; empty if there are none.

    Raises:
        ValueError: some are equal, or there are more or fewer than classes.
    """
    if names is not None and (len(names) != num_classes or len(set(names)) != num_classes):
        raise ValueError(
            f"class_names must be {num_classes} different names (num_classes), got {list(names)}"
        )
    return tuple(map(str, names or ()))


def _check_plateau(scheduler: LRScheduler, monitor: str) -> None:
    """Raise ValueError if the scheduler lowers the learning rate while a score rises, its default mode."""
    falls = isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "min"
    if falls and higher_is_better(monitor):
        raise ValueError(f"monitor={monitor!r} should rise: give ReduceLROnPlateau mode='max'")


def summed_confusion(metric: MulticlassConfusionMatrix) -> Tensor:
    """Return the confusion matrix ``(n, n)`` of an epoch, of all ranks: true classes in rows, on the CPU."""
    with metric.sync_context(should_sync=metric._to_sync):
        return metric.confmat.detach().cpu().clone()


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
        class_names: names of the classes in metrics and tables; None: those of the data module, else class numbers.

    Attributes:
        confusion: number of pixels or images of each class (row) that were taken for each class (column), ``(n, n)``,
            summed over all ranks, of the last test; None before.
        val_confusion: the same of the last validation; of a classification with more than 256 classes None.

    Raises:
        ValueError: ``num_classes`` is below 2, or class names do not fit.
    """

    confusion: Tensor | None
    val_confusion: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        monitor: str,
        example_input_shape: Sequence[int] | None,
        distillation: Distillation | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: need at least 2 classes; one object and its background are two"
            )
        self.net = net
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.monitor = monitor
        self.distillation = distillation
        self._given_names = check_names(class_names, num_classes)
        self.confusion = self.val_confusion = None
        if example_input_shape is not None:
            generator = torch.Generator().manual_seed(0)
            self.example_input_array = torch.rand(tuple(example_input_shape), generator=generator)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes: as given, else those that the data module knows, else their numbers."""
        data = getattr(self._trainer, "datamodule", None)
        known = tuple(map(str, getattr(data, "class_names", None) or ()))
        fitting = known if len(set(known)) == self.num_classes else tuple(map(str, range(self.num_classes)))
        return self._given_names or fitting

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
