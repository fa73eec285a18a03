"""Losses for segmentation: tensors in, scalar out (level 0)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["CrossEntropy", "WeightedSum"]

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


class WeightedSum(nn.Module):
    """Several losses of the same logits and target, summed.

    Args:
        losses: name -> ``loss(logits, target)``.
        weights: name -> factor; 1 where absent.

    Raises:
        ValueError: a weight names no loss.

    Example:
        >>> both = WeightedSum({"l1": nn.L1Loss(), "l2": nn.MSELoss()}, {"l2": 0.5})
        >>> both(torch.tensor([2.0]), torch.tensor([0.0]))
        tensor(4.)
    """

    def __init__(
        self, losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]], weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        if unknown := set(weights) - set(losses):
            raise ValueError(f"weights for {sorted(unknown)}, but the losses are {sorted(losses)}")
        self.losses = dict(losses)
        # Registered as well, so that class weights move to the device with the module.
        self.registered = nn.ModuleList(loss for loss in losses.values() if isinstance(loss, nn.Module))
        self.weights = {name: weights.get(name, 1.0) for name in losses}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The weighted sum, a scalar."""
        terms = [self.weights[name] * loss(logits, target) for name, loss in self.losses.items()]
        return torch.stack(terms).sum()
