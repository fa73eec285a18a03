"""Variance of each channel over all data, streaming and stable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ChannelVariance"]


class ChannelVariance(Metric):
    """Metric: variance of each channel over all data and positions, in O(C) memory.

    Batches are merged by the formula of Chan, Golub and LeVeque (1979) in double precision, processes by the same
    formula: the result does not suffer where the mean is large, nor depend on how the data is spread.

    Args:
        kwargs: as of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ChannelVariance()
        >>> metric.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> metric.compute()
        tensor([1., 0.], dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # rows: number of values, mean, sum of squared deviations; stacked, not summed, over processes
        self.add_state("moments", torch.zeros(3, 0, dtype=torch.float64), dist_reduce_fx=None)

    def set_dtype(self, dst_type: Any) -> ChannelVariance:
        """Keep double precision: a module that trains in half precision casts its metrics too."""
        return self

    def update(self, activation: Tensor) -> None:
        """Add one batch of activations, shape (N, C) or (N, C, ...)."""
        values = activation.detach().movedim(1, 0).flatten(1)
        if values.shape[1]:
            self.moments = merged(self._moments(len(values), values.device), batch_moments(values))

    def compute(self) -> Tensor:
        """Return the variance of each channel, shape (C,)."""
        ranks = self.moments if self.moments.dim() == 3 else self.moments[None]
        total = ranks[0]
        for moments in ranks[1:]:
            total = merged(total, moments)
        return total[2] / total[0]

    def conform_(self, shape: tuple[int, ...]) -> None:
        """Allocate zeros if this process observed nothing, so that it can take part in the reduction."""
        self.moments = self._moments(shape[0], self.moments.device)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Number of channels; None before the first batch."""
        return tuple(self.moments.shape[1:]) if self.moments.shape[1] else None

    def _moments(self, channels: int, device: torch.device) -> Tensor:
        if self.moments.shape[1]:
            return self.moments
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
        return torch.zeros(3, channels, dtype=dtype, device=device)


def batch_moments(values: Tensor) -> Tensor:
    """Return number, mean and sum of squared deviations of each row of (C, M), shape (3, C)."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    variance, mean = torch.var_mean(values, 1, correction=0)
    number = torch.full_like(mean, values.shape[1])
    return torch.stack([number, mean, variance * values.shape[1]])


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Return the moments of two sets of values together, shape (3, C).

    Example:
        >>> merged(batch_moments(torch.tensor([[1.0, 2.0]])), batch_moments(torch.tensor([[6.0]]))).tolist()
        [[3.0], [3.0], [14.0]]
    """
    b = b.to(a.dtype)
    number = a[0] + b[0]
    share = b[0] / number.clamp(min=1)
    step = b[1] - a[1]
    return torch.stack([number, a[1] + step * share, a[2] + b[2] + step.square() * a[0] * share])
