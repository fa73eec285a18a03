"""Semantic segmentation as a LightningModule: a network, a loss, and the *dataset* mIoU.

Two numbers are called mIoU, and they differ (0.805 against 0.637 on one toy set). What is logged here is the
dataset mIoU: one confusion matrix over all pixels of the epoch (and over all ranks), one IoU per class from
it, then their mean. It is not the mean over images of each image's mIoU.

A class that occurs neither in the masks nor in the predictions of an epoch has no IoU: it is logged as NaN
and left out of the mean. A class that is only predicted has IoU 0 and counts.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_prune.data.masks import check_mask
from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.mixin import DistillationMixin
from lightning_prune.segmentation.losses import Loss, loss_of, scheduled
from lightning_prune.segmentation.metrics import mean_iou

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

STAGES = ("train", "val", "test")
ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3)


def check_logits(logits: Any, target: Tensor, num_classes: int) -> None:
    """Refuse what is not ``(n, num_classes, h, w)`` logits for an ``(n, h, w)`` target.

    Raises:
        TypeError: if the network gave something other than a tensor (torchvision's models give a dict).
        ValueError: if the shapes do not fit.

    Example:
        >>> check_logits(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8), num_classes=3)
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"the net must give a tensor of logits, not {type(logits).__name__}: wrap it")
    expected = (target.shape[0], num_classes, *target.shape[1:])
    if target.ndim != 3 or logits.shape != expected:
        raise ValueError(
            f"the net gave logits {tuple(logits.shape)} for masks {tuple(target.shape)} and "
            f"num_classes={num_classes}; expected logits (n, num_classes, h, w) and masks (n, h, w)"
        )


def _check_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    names = tuple(map(str, range(num_classes))) if names is None else tuple(names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ValueError(
            f"class_names must be {num_classes} different names (num_classes), got {list(names)}"
        )
    return names


def _check_plateau(scheduler: LRScheduler, monitor: str) -> None:
    """Minimising an IoU would cut the learning rate for as long as the network improves."""
    rises = "/miou" in monitor or "/iou_" in monitor
    if rises and isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "min":
        raise ValueError(f"monitor={monitor!r} should rise: give ReduceLROnPlateau mode='max'")


class SegmentationModule(DistillationMixin):
    """Trains ``net`` on batches ``(image (n, c, h, w) float, mask (n, h, w) int64)``.

    A batch may have a third entry, the signed distances that losses of boundaries ask for.

    Logged once per epoch, for each stage of train, val and test: ``<stage>/loss``, ``<stage>/miou``, and for
    val and test ``<stage>/iou_<class>``; ``loss/weight_<part>`` of a loss whose weights change. See the module's
    docstring for what mIoU means here.

    Nothing but ``self.net`` refers to the network's parameters, so that a callback may replace ``p.data``.

    Args:
        net: anything that maps ``(n, c, h, w)`` to logits ``(n, num_classes, h, w)``.
        loss: ``loss(logits, target)``; must itself know ``ignore_index`` if there is one. Cross-entropy if None.
            What else it wants to know, it says: see :mod:`lightning_prune.segmentation.losses`.
        optimizer: called with the parameters that require gradients.
        scheduler: called with the optimizer, stepped once per epoch.
        num_classes: number of logits per pixel, at least 2.
        class_names: for the names of the logged values; class numbers if None.
        ignore_index: pixels with this number count for no metric; inside ``0 .. num_classes - 1`` the class
            itself is left out of the mean as well.
        monitor: what ``ReduceLROnPlateau`` watches. ``val/miou`` needs its ``mode="max"``.
        example_input_shape: with the batch dimension; sets ``example_input_array``.
        distillation: from whom to learn besides, and how much of it.

    Raises:
        ValueError: for ``num_classes < 2``, class names that do not fit, and while training for masks with class
            numbers out of range.

    Example:
        >>> net = nn.Conv2d(1, 3, 1)
        >>> module = SegmentationModule(net, num_classes=3, example_input_shape=(1, 1, 8, 8))
        >>> module(module.example_input_array).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        loss: Loss | None = None,
        optimizer: OptimizerFactory = ADAM,
        scheduler: SchedulerFactory | None = None,
        class_names: Sequence[str] | None = None,
        ignore_index: int | None = None,
        monitor: str = "val/loss",
        example_input_shape: Sequence[int] | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: one object needs 2 classes, itself and background")
        self.net = net
        self.num_classes = num_classes
        self.loss = loss or nn.CrossEntropyLoss(ignore_index=-100 if ignore_index is None else ignore_index)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.class_names = _check_names(class_names, num_classes)
        self.ignore_index = ignore_index
        self.monitor = monitor
        self.distillation = distillation
        self.iou = nn.ModuleDict({f"{stage}_iou": self._metric() for stage in STAGES})
        if example_input_shape is not None:
            generator = torch.Generator().manual_seed(0)
            self.example_input_array = torch.rand(tuple(example_input_shape), generator=generator)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(n, num_classes, h, w)`` for images ``(n, c, h, w)``."""
        return self.net(image)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of one batch, with gradient."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class numbers ``(n, h, w)``; the batch may be images alone or images with masks."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch).argmax(1)

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's pixels; log the weights of a loss that change with the epoch."""
        self._metric_of("train").reset()
        weights = scheduled(self.loss, self.current_epoch)
        self.log_dict({f"loss/weight_{name}": weight for name, weight in weights.items()})

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's pixels."""
        self._metric_of("val").reset()

    def on_test_epoch_start(self) -> None:
        """Forget the last epoch's pixels."""
        self._metric_of("test").reset()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mIoU, unless the epoch was resumed at its end, so that none of it was seen."""
        if self._metric_of("train").update_called:
            self._log_iou("train", per_class=False)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's mIoU and the IoU of each class."""
        self._log_iou("val", per_class=True)

    def on_test_epoch_end(self) -> None:
        """Log the epoch's mIoU and the IoU of each class."""
        self._log_iou("test", per_class=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what requires gradients, and its scheduler with ``monitor``."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        _check_plateau(scheduler, self.monitor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}

    def _metric(self) -> MulticlassJaccardIndex:
        return MulticlassJaccardIndex(
            self.num_classes,
            average="none",
            ignore_index=self.ignore_index,
            validate_args=False,
            zero_division=float("nan"),
        )

    def _metric_of(self, stage: str) -> MulticlassJaccardIndex:
        metric = self.iou[f"{stage}_iou"]
        assert isinstance(metric, MulticlassJaccardIndex)
        return metric

    def _step(self, batch: tuple[Tensor, ...], stage: str) -> Tensor:
        """Waits for the device between forward and loss only, where the metric makes it wait anyhow."""
        image, target, *more = batch
        logits = self(image)
        check_logits(logits, target, self.num_classes)
        check_mask(target, self.num_classes, self.ignore_index)
        known = {"distances": more[0] if more else None, "epoch": self.current_epoch}
        loss = loss_of(self.loss, logits, target, **known)
        self._metric_of(stage).update(logits.detach().max(1).indices, target)
        self._log_loss(loss.detach(), stage, len(image))
        return loss

    def _log_loss(self, loss: Tensor, stage: str, size: int) -> None:
        bar, sync = stage != "test", stage != "train"
        self.log(
            f"{stage}/loss", loss, on_step=False, on_epoch=True, prog_bar=bar, sync_dist=sync, batch_size=size
        )

    def _log_iou(self, stage: str, per_class: bool) -> None:
        """Every rank holds the same numbers: the metric was summed over ranks by ``compute``."""
        iou = self._metric_of(stage).compute()
        if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes:
            iou = iou.index_fill(0, torch.tensor(self.ignore_index, device=iou.device), float("nan"))
        self.log(f"{stage}/miou", mean_iou(iou), prog_bar=stage != "test", sync_dist=True)
        if per_class:
            names = (f"{stage}/iou_{name}" for name in self.class_names)
            self.log_dict(dict(zip(names, iou, strict=True)), sync_dist=True)
