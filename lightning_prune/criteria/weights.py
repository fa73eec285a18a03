"""Criteria that need weights only: norms of filters, FPGM, LAMP, scales of norms, and random scores."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lightning_prune.criteria.base import NO_STATISTICS, Importance, ObservesNothing, Statistics, Values
from lightning_prune.criteria.reduction import (
    Normalise,
    Reduction,
    Scope,
    in_scope,
    norm_scales,
    norms,
    plain,
    reduced,
    rows,
    share_of_larger,
)
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["FPGM", "L1", "L2", "LAMP", "Norm", "NormScale", "Random", "distances"]


@dataclass(frozen=True)
class Norm(ObservesNothing):
    """Norm of the filters, ``||W_k||_p``, reduced over the filters of a unit.

    Args:
        p: order of the norm.
        reduction: over the slices that belong to a unit: ``"mean"``, ``"sum"`` or ``"max"``.
        scope: ``"filters"``, or ``"bound"``: norm scales and the input slices of consumers too.
        normalise: ``"none"``, or by the mean over ``"layer"``, ``"group"`` or ``"global"``.

    Example:
        >>> from lightning_prune import one_shot
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(net, torch.zeros(1, 1, 8, 8), {"macs": 0.5}, Norm(p=1, scope="bound"))
        >>> net[0].out_channels
        4
    """

    p: int = 2
    reduction: Reduction = "mean"
    scope: Scope = "filters"
    normalise: Normalise = "none"

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        slices = in_scope(graph, model, self.scope)
        pieces = [(units, self.score(model.get_parameter(name), dim)) for name, dim, units in slices]
        return reduced(graph, pieces, self.reduction, self.normalise)

    def score(self, weight: torch.Tensor, dim: int) -> Values:
        """Return one value per slice along ``dim``."""
        return norms(weight, dim, self.p)


@dataclass(frozen=True)
class L1(Norm):
    """Sum of a filter's absolute weights (Li et al., 2017). Arguments as for :class:`Norm`, without ``p``.

    Example:
        >>> L1().score(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), 0)
        array([3., 7.])
    """

    p: int = field(default=1, init=False)


@dataclass(frozen=True)
class L2(Norm):
    """Euclidean norm of a filter's weights. Arguments as for :class:`Norm`, without ``p``.

    Example:
        >>> L2().score(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), 0)
        array([5., 1.])
    """

    p: int = field(default=2, init=False)


@dataclass(frozen=True)
class FPGM(Norm):
    """Distance of a filter from the others of its layer, ``sum_j ||W_k - W_j||_p`` (He et al., CVPR 2019).

    A filter near the geometric median of its layer can be replaced by the others. Arguments as for :class:`Norm`.

    Example:
        >>> FPGM().score(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]), 0)
        array([10.,  5.,  5.])
    """

    def score(self, weight: torch.Tensor, dim: int) -> Values:
        """Return one value per slice along ``dim``."""
        return distances(weight, dim, self.p)


@dataclass(frozen=True)
class LAMP(Norm):
    """Squared norm of a filter as a share of those of its layer that are at least as large (Lee et al., ICLR 2021).

    The paper scores single weights; this scores filters, as Torch-Pruning does. Arguments as for :class:`Norm`,
    without ``p``.

    Example:
        >>> LAMP().score(torch.tensor([[1.0], [2.0]]), 0)  # 1 / (1 + 4), 4 / 4
        array([0.2, 1. ])
    """

    p: int = field(default=2, init=False)

    def score(self, weight: torch.Tensor, dim: int) -> Values:
        """Return one value per slice along ``dim``."""
        return share_of_larger(norms(weight, dim, 2) ** 2)


def distances(weight: torch.Tensor, dim: int = 0, p: int = 2) -> Values:
    """Return the sum of each slice's distances to all others along ``dim``.

    Example:
        >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))
        array([10.,  5.,  5.])
    """
    flat = rows(weight, dim)
    # Differences, not the expansion of the square, which cancels for filters that are nearly equal.
    exact = "donot_use_mm_for_euclid_dist"
    return plain(torch.cdist(flat[None], flat[None], p=float(p), compute_mode=exact)[0].sum(1))


@dataclass(frozen=True)
class NormScale(ObservesNothing):
    """Absolute scale ``|gamma|`` of the norms that a unit passes through (network slimming, Liu et al., ICCV 2017).

    Units that pass no norm with a learnt scale are never removed.

    Args:
        reduction: over the norms of a unit.
        normalise: ``"none"``, or by the mean over ``"layer"`` (each norm), ``"group"`` or ``"global"``.

    Raises:
        ValueError: when called: the network has no such norm.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 3))
        >>> graph = trace(net, torch.zeros(2, 1, 8, 8))
        >>> net[1].weight.data = torch.tensor([0.5, -2.0, 1.0])
        >>> NormScale()(graph, net)[graph.layers["0.weight"]]
        array([0.5, 2. , 1. ])
    """

    reduction: Reduction = "mean"
    normalise: Normalise = "none"

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        scales = norm_scales(graph, model)
        if not scales:
            raise ValueError(
                "NormScale ranks by the scales of norms, but no filter of this network passes through one; use L2 "
                "or IPAD"
            )
        pieces = [(units, plain(model.get_parameter(name).abs())) for name, units in scales.items()]
        return reduced(graph, pieces, self.reduction, self.normalise)


@dataclass(frozen=True)
class Random(ObservesNothing):
    """Random scores: the baseline that every criterion has to beat.

    The same seed and number of units give the same scores.

    Example:
        >>> graph = ChannelGraph(3, {}, {}, {}, {}, {})
        >>> bool((Random(1)(graph, nn.Identity(), {}) == Random(1)(graph, nn.Identity(), {})).all())
        True
    """

    seed: int = 0

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        return np.random.default_rng([self.seed, graph.num_units]).random(graph.num_units)
