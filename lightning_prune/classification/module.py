"""LightningModule for the classification of images: a network, a loss, and the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_prune.data.masks import check_mask
from lightning_prune.distillation.config import Distillation
from lightning_prune.tasks.module import (
    ADAM,
    STAGES,
    OptimizerFactory,
    SchedulerFactory,
    TaskModule,
    summed_confusion,
)
from lightning_prune.utils.metrics import CONFUSION_CLASSES

__all__ = ["ClassificationModule"]


def _check_logits(logits: Any, target: Tensor, num_classes: int) -> None:
    """Raise unless the output of a network is ``(n, num_classes)`` logits for ``(n,)`` class numbers."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"the net must return a tensor of logits, not {type(logits).__name__}: wrap it")
    if target.ndim != 1 or logits.shape != (len(target), num_classes):
        raise ValueError(
            f"the net returned logits {tuple(logits.shape)} for targets {tuple(target.shape)} and "
            f"num_classes={num_classes}; expected logits (n, num_classes) and targets (n,)"
        )


class ClassificationModule(TaskModule):
    """LightningModule that trains ``net`` on batches ``(image (n, c, h, w) float, class number (n,) int64)``.

    Logged once per epoch: ``<stage>/loss`` and ``<stage>/accuracy`` of the stages train, val and test, and
    ``test/accuracy_<class>``, the share of the images of a class that are recognised. The accuracy is that of all
    images of the epoch and of all ranks.

    Only ``self.net`` refers to the network's parameters, so that a callback may replace ``p.data``.

    Args:
        net: network that maps ``(n, c, h, w)`` to logits ``(n, num_classes)``.
        num_classes: number of classes, at least 2.
        loss: ``loss(logits, target)``; None: cross-entropy.
        optimizer: called with the parameters that require gradients.
        scheduler: called with the optimizer, stepped once per epoch.
        monitor: metric for ``ReduceLROnPlateau``. ``val/accuracy`` requires its ``mode="max"``.
        example_input_shape: shape of ``example_input_array``, with the batch dimension; None: there is none.
        distillation: options of distillation from a teacher.
        class_names: names of the classes in logged metrics and tables; None: those of the data module, else class
            numbers.

    Raises:
        ValueError: ``num_classes`` is below 2, or class names do not fit; in training: a class number is out of
            range, or shapes do not fit.
        TypeError: in training: the network returns no tensor.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> module = ClassificationModule(net, num_classes=3, example_input_shape=(1, 1, 8, 8))
        >>> module(module.example_input_array).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: OptimizerFactory = ADAM,
        scheduler: SchedulerFactory | None = None,
        monitor: str = "val/loss",
        example_input_shape: Sequence[int] | None = None,
        distillation: Distillation | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        task = (net, num_classes, optimizer, scheduler, monitor, example_input_shape, distillation)
        super().__init__(*task, class_names)
        self.loss = loss or nn.CrossEntropyLoss()
        self.matrix = MulticlassConfusionMatrix(num_classes, validate_args=False)  # of a validation or a test
        self.accuracy = nn.ModuleDict({f"{stage}_accuracy": self._metric() for stage in STAGES})

    def step(self, batch: tuple[Tensor, ...], stage: str) -> Tensor:
        """Return the loss of one batch, and update and log the metrics of the stage."""
        image, target = batch[0], batch[1]
        logits = self(image)
        _check_logits(logits, target, self.num_classes)
        check_mask(target, self.num_classes, where="target")
        loss = self.loss(logits, target)
        accuracy = self.accuracy[f"{stage}_accuracy"]
        assert isinstance(accuracy, MulticlassAccuracy)
        accuracy.update(logits.detach(), target)
        if stage == "test" or (stage == "val" and self._keeps_validation):
            self.matrix.update(logits.detach(), target)
        self._log_loss(loss.detach(), stage, len(image))
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=stage != "test")
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the confusion of the classes."""
        self.matrix.reset()

    def on_validation_epoch_end(self) -> None:
        """Keep the confusion of the classes, unless there are too many."""
        if self._keeps_validation:
            self.val_confusion = summed_confusion(self.matrix)

    def on_test_epoch_start(self) -> None:
        """Reset the confusion of the classes."""
        self.matrix.reset()

    def on_test_epoch_end(self) -> None:
        """Log the accuracy of each class, and keep the confusion of the classes."""
        self.confusion = summed_confusion(self.matrix)
        shares = self.confusion.diagonal() / self.confusion.sum(1)  # NaN for a class without images
        scores = zip(self.class_names, shares.to(self.device), strict=True)
        self.log_dict({f"test/accuracy_{name}": share for name, share in scores}, sync_dist=True)

    @property
    def _keeps_validation(self) -> bool:
        """Whether validations count the confusion, which takes gigabytes for many classes in deterministic mode."""
        return self.num_classes <= CONFUSION_CLASSES

    def _metric(self) -> MulticlassAccuracy:
        return MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
