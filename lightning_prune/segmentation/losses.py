"""Losses for segmentation: functions of tensors that return a scalar.

A loss is called as ``loss(logits, target)``. One that needs more arguments names them in its attribute ``wants``:
``"distances"``, the third entry of a batch, or ``"epoch"``, a number from 0. :func:`loss_of` passes these by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CrossEntropy", "EpochRamp", "Loss", "WeightedSum", "loss_of", "scheduled"]

#: ``loss(logits, target)``, with the arguments that it ``wants`` by name
Loss = Callable[..., Tensor]
Weight = float | Callable[[int], float]

NO_CLASS = -100  # torch's default of ignore_index, which no mask contains


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's cross-entropy with arguments of plain types, for configuration files.

    Args:
        ignore_index: class number of the pixels to leave out; None: none are.
        weight: one number per class.
        label_smoothing: in [0, 1].

    Example:
        >>> loss = CrossEntropy(ignore_index=255, weight=[1, 3])
        >>> loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]))
        tensor(0.6931)
    """

    def __init__(
        self,
        ignore_index: int | None = None,
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            weight=None if weight is None else torch.tensor(weight, dtype=torch.float32),
            ignore_index=NO_CLASS if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
        )


class EpochRamp:
    """Loss weight that changes linearly from one value to another over a number of epochs.

    Args:
        first: value in epoch 0.
        last: value from epoch ``epochs`` on.
        epochs: number of epochs of the change.
        at_most: upper bound of ``epochs``, such as the length of the training (as in RITnet's code); None or -1: no
            bound.

    Raises:
        ValueError: ``epochs`` is below 1.

    Example:
        >>> [EpochRamp(1.0, 0.0, epochs=125, at_most=4)(epoch) for epoch in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """

    def __init__(self, first: float, last: float, epochs: int, at_most: int | None = None) -> None:
        if epochs < 1:
            raise ValueError(f"a weight takes at least one epoch to change, got epochs={epochs}")
        self.first, self.last = first, last
        self.epochs = min(epochs, at_most) if at_most is not None and at_most > 0 else epochs

    def __call__(self, epoch: int) -> float:
        """Return the weight in an epoch, counted from 0."""
        return self.first + min(epoch / self.epochs, 1.0) * (self.last - self.first)


def loss_of(loss: Loss, logits: Tensor, target: Tensor, **extras: Any) -> Tensor:
    """Return ``loss(logits, target)``, called with those of the ``extras`` that it ``wants``.

    Example:
        >>> loss_of(nn.L1Loss(), torch.tensor([2.0]), torch.tensor([0.0]), epoch=3)
        tensor(2.)
    """
    return loss(logits, target, **{name: extras[name] for name in getattr(loss, "wants", ())})


def scheduled(loss: Loss, epoch: int) -> dict[str, float]:
    """Return the weights of a :class:`WeightedSum` that depend on the epoch, at an epoch; none for other losses.

    Example:
        >>> both = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, {"l2": EpochRamp(0, 1, epochs=4)})
        >>> scheduled(both, 1), scheduled(nn.L1Loss(), 1)
        ({'l2': 0.25}, {})
    """
    if not isinstance(loss, WeightedSum):
        return {}
    return {name: loss.weight(name, epoch) for name, weight in loss.weights.items() if callable(weight)}


class WeightedSum(nn.Module):
    """Weighted sum of several losses of the same logits and target.

    Args:
        losses: name -> loss; losses may have an attribute ``wants``.
        weights: name -> factor, or a function of the epoch such as :class:`EpochRamp`; 1 for losses that are not
            named.

    Raises:
        ValueError: a weight has the name of no loss.

    Example:
        >>> both = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, {"l2": 0.5})
        >>> both(torch.tensor([2.0]), torch.tensor([0.0]))
        tensor(4.)
    """

    def __init__(self, losses: Mapping[str, Loss], weights: Mapping[str, Weight]) -> None:
        super().__init__()
        if unknown := set(weights) - set(losses):
            raise ValueError(f"weights for {sorted(unknown)}, but the losses are {sorted(losses)}")
        self.losses = dict(losses)
        # A dict registers no modules; the list does, so that class weights move to the device with the module.
        self.registered = nn.ModuleList(loss for loss in losses.values() if isinstance(loss, nn.Module))
        self.weights = {name: weights.get(name, 1.0) for name in losses}
        names = {name for loss in losses.values() for name in getattr(loss, "wants", ())}
        if any(map(callable, self.weights.values())):
            names.add("epoch")
        self.wants = tuple(sorted(names))

    def forward(self, logits: Tensor, target: Tensor, **extras: Any) -> Tensor:
        """Return the weighted sum, a scalar; ``extras`` are the arguments that this loss ``wants``."""
        epoch = extras.get("epoch", 0)
        terms = [
            self.weight(name, epoch) * loss_of(loss, logits, target, **extras)
            for name, loss in self.losses.items()
        ]
        return torch.stack(terms).sum()

    def weight(self, name: str, epoch: int) -> float:
        """Return the factor of one loss in an epoch, counted from 0."""
        weight = self.weights[name]
        return float(weight(epoch)) if callable(weight) else weight
