"""Losses for segmentation: tensors in, scalar out (level 0).

A loss takes logits and target. What else it wants to know it says by name, in its attribute ``wants``:
``"distances"``, the third entry of a batch, and ``"epoch"``, a number from 0. :func:`loss_of` gives it to those who
ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CrossEntropy", "EpochRamp", "Loss", "WeightedSum", "loss_of", "scheduled"]

#: ``loss(logits, target)``, and what it wants by name
Loss = Callable[..., Tensor]
Weight = float | Callable[[int], float]

NO_CLASS = -100  # torch's own default: no mask holds it


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's cross-entropy with arguments as a configuration file writes them.

    Args:
        ignore_index: class number of pixels that do not count; None: all count.
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
    """A weight that goes from one value to another over so many epochs, in a straight line.

    Args:
        first: in epoch 0.
        last: from epoch ``epochs`` on.
        epochs: how long it takes.
        at_most: of the training, which shortens what takes longer (as RITnet's code does); None or -1: no end.

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
        """The weight in an epoch, counted from 0."""
        return self.first + min(epoch / self.epochs, 1.0) * (self.last - self.first)


def loss_of(loss: Loss, logits: Tensor, target: Tensor, **known: Any) -> Tensor:
    """``loss(logits, target)``, and by name what it ``wants`` of what is ``known``.

    Example:
        >>> loss_of(nn.L1Loss(), torch.tensor([2.0]), torch.tensor([0.0]), epoch=3)
        tensor(2.)
    """
    return loss(logits, target, **{name: known[name] for name in getattr(loss, "wants", ())})


def scheduled(loss: Loss, epoch: int) -> dict[str, float]:
    """The weights of a :class:`WeightedSum` that change with the epoch, as they are in it; of others: none.

    Example:
        >>> both = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, {"l2": EpochRamp(0, 1, epochs=4)})
        >>> scheduled(both, 1), scheduled(nn.L1Loss(), 1)
        ({'l2': 0.25}, {})
    """
    if not isinstance(loss, WeightedSum):
        return {}
    return {name: loss.weight(name, epoch) for name, weight in loss.weights.items() if callable(weight)}


class WeightedSum(nn.Module):
    """Several losses of the same logits and target, summed.

    Args:
        losses: name -> ``loss(logits, target)``, or one that wants more.
        weights: name -> factor, or a function of the epoch such as :class:`EpochRamp`; 1 where absent.

    Raises:
        ValueError: a weight names no loss.

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
        # Registered as well, so that class weights move to the device with the module.
        self.registered = nn.ModuleList(loss for loss in losses.values() if isinstance(loss, nn.Module))
        self.weights = {name: weights.get(name, 1.0) for name in losses}
        wanted = {name for loss in losses.values() for name in getattr(loss, "wants", ())}
        changing = {"epoch"} if any(map(callable, self.weights.values())) else set()
        self.wants = tuple(sorted(wanted | changing))

    def forward(self, logits: Tensor, target: Tensor, **known: Any) -> Tensor:
        """The weighted sum, a scalar; ``known`` is what this loss ``wants``."""
        epoch = known.get("epoch", 0)
        terms = [
            self.weight(name, epoch) * loss_of(loss, logits, target, **known)
            for name, loss in self.losses.items()
        ]
        return torch.stack(terms).sum()

    def weight(self, name: str, epoch: int) -> float:
        """The factor of one loss in an epoch, counted from 0."""
        weight = self.weights[name]
        return float(weight(epoch)) if callable(weight) else weight
