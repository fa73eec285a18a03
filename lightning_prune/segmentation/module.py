"""LightningModule for semantic segmentation: a network, a loss, and the *dataset* mIoU.

Two different numbers are called mIoU (0.805 and 0.637 on one toy set). The dataset mIoU, which is logged here, comes
from one confusion matrix over all pixels of the epoch and all ranks: it gives one IoU per class, and their mean. The
other is the mean over images of each image's mIoU.

A class that occurs neither in the masks nor in the predictions of an epoch has no IoU: it is logged as NaN and left
out of the mean. A class that is predicted but occurs in no mask has IoU 0 and is part of the mean.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_prune.data.masks import check_mask
from lightning_prune.distillation.config import Distillation
from lightning_prune.segmentation.losses import Loss, loss_of, scheduled
from lightning_prune.segmentation.metrics import mean_iou
from lightning_prune.tasks.module import (
    ADAM,
    STAGES,
    OptimizerFactory,
    SchedulerFactory,
    TaskModule,
    summed_confusion,
)


def check_logits(logits: Any, target: Tensor, num_classes: int) -> None:
    """Raise unless the output of a network is ``(n, num_classes, h, w)`` logits for an ``(n, h, w)`` target.

    Raises:
        TypeError: the output is no tensor (torchvision's models return a dictionary).
        ValueError: the shapes do not fit.

    Example:
        >>> check_logits(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8), num_classes=3)
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"the net must return a tensor of logits, not {type(logits).__name__}: wrap it")
    expected = (target.shape[0], num_classes, *target.shape[1:])
    if target.ndim != 3 or logits.shape != expected:
        raise ValueError(
            f"the net returned logits {tuple(logits.shape)} for masks {tuple(target.shape)} and "
            f"num_classes={num_classes}; expected logits (n, num_classes, h, w) and masks (n, h, w)"
        )


class SegmentationModule(TaskModule):
    """LightningModule that trains ``net`` on batches ``(image (n, c, h, w) float, mask (n, h, w) int64)``.

    A batch may have a third entry, the signed distances for boundary losses.

    Logged once per epoch: ``<stage>/loss`` and ``<stage>/miou`` of the stages train, val and test,
    ``<stage>/iou_<class>`` of val and test, and ``loss/weight_<part>`` of a loss whose weights depend on the epoch.
    The docstring of the module defines mIoU.

    Only ``self.net`` refers to the network's parameters, so that a callback may replace ``p.data``.

    Args:
        net: network that maps ``(n, c, h, w)`` to logits ``(n, num_classes, h, w)``.
        loss: ``loss(logits, target)``, with its own ``ignore_index`` if there is one; None: cross-entropy. For losses
            with more arguments see :mod:`lightning_prune.segmentation.losses`.
        optimizer: called with the parameters that require gradients.
        scheduler: called with the optimizer, stepped once per epoch.
        num_classes: number of logits per pixel, at least 2.
        class_names: names of the classes in logged metrics and tables; None: those of the data module, else class
            numbers.
        ignore_index: class number of the pixels that are left out of the metrics. If it is in
            ``0 .. num_classes - 1``, that class is left out of the mean too.
        monitor: metric for ``ReduceLROnPlateau``. ``val/miou`` requires its ``mode="max"``.
        example_input_shape: shape of ``example_input_array``, with the batch dimension; None: there is none.
        distillation: options of distillation from a teacher.

    Raises:
        ValueError: ``num_classes`` is below 2, or class names do not fit; in training: a mask has a class number out
            of range.

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
        task = (net, num_classes, optimizer, scheduler, monitor, example_input_shape, distillation)
        super().__init__(*task, class_names)
        self.loss = loss or nn.CrossEntropyLoss(ignore_index=-100 if ignore_index is None else ignore_index)
        self.ignore_index = ignore_index
        self.iou = nn.ModuleDict({f"{stage}_iou": self._metric() for stage in STAGES})

    def step(self, batch: tuple[Tensor, ...], stage: str) -> Tensor:
        """Return the loss of one batch, and update and log the metrics of the stage."""
        image, target, *rest = batch
        logits = self(image)
        check_logits(logits, target, self.num_classes)
        check_mask(target, self.num_classes, self.ignore_index)
        distances = rest[0] if rest else None
        loss = loss_of(self.loss, logits, target, distances=distances, epoch=self.current_epoch)
        self._metric_of(stage).update(logits.detach().max(1).indices, target)
        self._log_loss(loss.detach(), stage, len(image))
        return loss

    def on_train_epoch_start(self) -> None:
        """Reset the metric, and log the loss weights that depend on the epoch."""
        self._metric_of("train").reset()
        weights = scheduled(self.loss, self.current_epoch)
        self.log_dict({f"loss/weight_{name}": weight for name, weight in weights.items()})

    def on_validation_epoch_start(self) -> None:
        """Reset the metric."""
        self._metric_of("val").reset()

    def on_test_epoch_start(self) -> None:
        """Reset the metric."""
        self._metric_of("test").reset()

    def on_train_epoch_end(self) -> None:
        """Log the mIoU of the epoch."""
        if self._metric_of(
            "train"
        ).update_called:  # not if training resumed after the last batch of the epoch
            self._log_iou("train", per_class=False)

    def on_validation_epoch_end(self) -> None:
        """Log the mIoU of the epoch and the IoU of each class, and keep the confusion of the classes."""
        self._log_iou("val", per_class=True)
        self.val_confusion = summed_confusion(self._metric_of("val"))

    def on_test_epoch_end(self) -> None:
        """Log the mIoU of the epoch and the IoU of each class, and keep the confusion of the classes."""
        self._log_iou("test", per_class=True)
        self.confusion = summed_confusion(self._metric_of("test"))

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

    def _log_iou(self, stage: str, per_class: bool) -> None:
        """Log the mIoU of a stage, and the IoU of each class if ``per_class``."""
        iou = self._metric_of(stage).compute()  # summed over all ranks
        if self.ignore_index is not None and 0 <= self.ignore_index < self.num_classes:
            iou = iou.index_fill(0, torch.tensor(self.ignore_index, device=iou.device), float("nan"))
        self.log(f"{stage}/miou", mean_iou(iou), prog_bar=stage != "test", sync_dist=True)
        if per_class:
            names = (f"{stage}/iou_{name}" for name in self.class_names)
            self.log_dict(dict(zip(names, iou, strict=True)), sync_dist=True)
