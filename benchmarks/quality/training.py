"""Training and scoring by plain loops: the same steps, rate and batches for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.quality.data import Part
from lightning_prune.utils.batch_norm import recalibrate_

__all__ = [
    "LogitLoss",
    "Loss",
    "batches_of",
    "confusion",
    "cross_entropy",
    "distilled",
    "factor",
    "fit",
    "recalibrate",
]

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
LogitLoss = Callable[[Tensor, Tensor], Tensor]  # of the logits of student and teacher
WARM_UP = 0.1  # share of the steps in which the rate rises
RECALIBRATION_BATCHES = 8
EVALUATION_BATCH = 100


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    """Return the loss of classes or of pixels."""
    return F.cross_entropy(net(batch[0]), batch[1])


def distilled(teacher: nn.Module, loss: LogitLoss, weight: float = 1.0) -> Loss:
    """Return the task's loss plus a weighted distillation loss from ``teacher``."""
    teacher.eval()

    def total(net: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = net(images)
        return F.cross_entropy(logits, targets) + weight * loss(logits, teacher_logits)

    return total


def factor(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of its maximum: a linear rise, then a cosine to zero.

    Example:
        >>> [round(factor(step, 20), 2) for step in (0, 1, 11, 20)]
        [0.5, 1.0, 0.5, 0.0]
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def batches_of(part: Part, size: int, count: int, seed: int) -> Iterator[Batch]:
    """Yield ``count`` batches in an order that depends on the seed alone; each pass shows every image once."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(part), generator=generator)])
        index, order = order[:size].to(part.targets.device), order[size:]
        yield part.images[index], part.targets[index]


def fit(
    net: nn.Module,
    part: Part,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    loss: Loss = cross_entropy,
    before_step: Callable[[], None] | None = None,
) -> None:
    """Train with a new AdamW, warm-up and a cosine to zero.

    Args:
        net: trained in place.
        part: the training samples.
        steps: number of steps.
        batch: size of a batch.
        rate: the largest learning rate.
        seed: of the order of the samples.
        loss: ``(network, batch) -> loss``.
        before_step: called between backward pass and step, to change gradients.
    """
    optimizer: Optimizer = AdamW(net.parameters(), lr=rate, weight_decay=1e-4)
    schedule = LambdaLR(optimizer, partial(factor, steps=steps))
    net.train()
    for samples in batches_of(part, batch, steps, seed):
        optimizer.zero_grad()
        loss(net, samples).backward()
        if before_step is not None:
            before_step()
        optimizer.step()
        schedule.step()


def recalibrate(net: nn.Module, part: Part, batch: int) -> None:
    """Estimate the statistics of batch norms anew on the same few training batches for every method."""
    recalibrate_(net, (((images,), {}) for images, _ in batches_of(part, batch, RECALIBRATION_BATCHES, 0)))


@torch.no_grad()
def confusion(net: nn.Module, part: Part, classes: int) -> Tensor:
    """Return how often each class (row) is predicted as each class (column), shape (classes, classes)."""
    net.eval()
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    pairs = zip(part.images.split(EVALUATION_BATCH), part.targets.split(EVALUATION_BATCH), strict=True)
    for images, targets in pairs:
        index = targets * classes + net(images).argmax(1)
        counts += torch.bincount(index.flatten(), minlength=classes * classes).cpu()
    return counts.view(classes, classes)
