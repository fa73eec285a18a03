"""Mean absolute activation as a criterion. Activation deviation is part of IPAD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_prune.criteria.base import NO_STATISTICS, Importance, Observer, Statistics
from lightning_prune.criteria.collector import Collector
from lightning_prune.criteria.reduction import Normalise, Reduction, per_unit
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["ActivationMean", "MeanActivation"]


class MeanActivation(Metric):
    """Metric: ``mean |A|`` of each channel over all data and positions, in O(C) memory.

    Example:
        >>> metric = MeanActivation()
        >>> metric.update(torch.tensor([[[1.0, -3.0], [0.0, 4.0]]]))
        >>> metric.compute()
        tensor([2., 2.])
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    positions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(0), dist_reduce_fx="sum")
        self.add_state("positions", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, activation: Tensor) -> None:
        """Add one batch of a layer's output, shape (N, C) or (N, C, ...)."""
        magnitude = activation.detach().movedim(1, 0).flatten(1).abs().sum(1, dtype=torch.float32)
        self.total = self.total + magnitude if len(self.total) else magnitude
        self.positions = self.positions + activation.numel() // activation.shape[1]

    def compute(self) -> Tensor:
        """Return the mean of each channel, shape (C,)."""
        return self.total / self.positions

    def conform_(self, shape: tuple[int, ...]) -> None:
        """Allocate zeros if this process observed nothing, so that it can take part in the sum over processes."""
        if not len(self.total):
            self.total = self.total.new_zeros(shape)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Number of channels; None before the first batch."""
        return tuple(self.total.shape) if len(self.total) else None


@dataclass(frozen=True)
class ActivationMean:
    """Mean absolute output of a filter before normalisation, ``mean |A_k|``, over the training data.

    Layers that run without their forward hooks keep their filters.

    Args:
        reduction: over the filters of a unit.
        normalise: ``"none"``, or by the mean over ``"layer"``, ``"group"`` or ``"global"``.

    Raises:
        ValueError: when called: there are no statistics.

    Example:
        >>> from lightning_prune import one_shot
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(
        ...     net, torch.zeros(1, 1, 8, 8), {"macs": 0.5}, ActivationMean(), [torch.randn(16, 1, 8, 8)]
        ... )
        >>> net[0].out_channels
        4
    """

    reduction: Reduction = "mean"
    normalise: Normalise = "none"

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer:
        """Return an observer of the mean absolute activation of all layers."""
        return Collector(graph, model, MeanActivation)

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        if not statistics:
            raise ValueError("ActivationMean needs activation statistics and got none: did any batch run?")
        return per_unit(graph, statistics, self.reduction, self.normalise)
