"""Criteria that look at weights only: norms, FPGM, LAMP, slimming's gamma, and the baseline (level 3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lightning_prune.criteria.base import NOTHING, Importance, Statistics, Values
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
)
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["FPGM", "L1", "L2", "LAMP", "Norm", "NormScale", "Random", "distances", "lamp"]


@dataclass(frozen=True)
class Norm:
    """Size of the filters: ``||W_k||_p``, reduced over the filters of a unit.

    Args:
        p: order of the norm.
        reduction: over what speaks for a unit: ``"mean"``, ``"sum"`` or ``"max"``.
        scope: ``"filters"``, or ``"bound"``: norm scales and the input slices of consumers too.
        normalise: ``"none"``, or by the mean over ``"layer"``, ``"group"`` or ``"global"``.
    """

    p: int = 2
    reduction: Reduction = "mean"
    scope: Scope = "filters"
    normalise: Normalise = "none"
    statistic = None

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        slices = in_scope(graph, model, self.scope)
        pieces = [(units, self.score(model.get_parameter(name), dim)) for name, dim, units in slices]
        return reduced(graph, pieces, self.reduction, self.normalise)

    def score(self, weight: torch.Tensor, dim: int) -> Values:
        """One value for each slice along ``dim``."""
        return norms(weight, dim, self.p)


@dataclass(frozen=True)
class L1(Norm):
    """Sum of a filter's absolute weights (Li et al., 2017)."""

    p: int = field(default=1, init=False)


@dataclass(frozen=True)
class L2(Norm):
    """Euclidean norm of a filter's weights."""

    p: int = field(default=2, init=False)


@dataclass(frozen=True)
class FPGM(Norm):
    """How far a filter lies from the others of its layer: ``sum_j ||W_k - W_j||_p`` (He et al., CVPR 2019).

    A filter near the geometric median of its layer can be replaced by the others.
    """

    def score(self, weight: torch.Tensor, dim: int) -> Values:
        """One value for each slice along ``dim``."""
        return distances(weight, dim, self.p)


@dataclass(frozen=True)
class LAMP(Norm):
    """A filter's squared norm as a share of those of its layer that are at least as large (Lee et al., ICLR 2021).

    The paper scores single weights; filters take their place here, as in Torch-Pruning.
    """

    p: int = field(default=2, init=False)

    def score(self, weight: torch.Tensor, dim: int) -> Values:
        """One value for each slice along ``dim``."""
        return lamp(norms(weight, dim, 2) ** 2)


def distances(weight: torch.Tensor, dim: int = 0, p: int = 2) -> Values:
    """Sum of each slice's distances to all others along ``dim``.

    Example:
        >>> distances(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))
        array([10.,  5.,  5.])
    """
    flat = rows(weight, dim)
    # Differences, not the expansion of the square, which cancels for filters that are nearly equal.
    exact = "donot_use_mm_for_euclid_dist"
    return plain(torch.cdist(flat[None], flat[None], p=float(p), compute_mode=exact)[0].sum(1))


def lamp(squares: Values) -> Values:
    """Each value over the sum of those that are not smaller; the largest gets 1. Ties go by position.

    Example:
        >>> lamp(np.array([1.0, 4.0, 3.0]))
        array([0.125     , 1.        , 0.42857143])
    """
    order = np.argsort(squares, kind="stable")
    ascending = squares[order]
    larger = np.cumsum(ascending[::-1])[::-1]
    found = np.empty_like(ascending)
    found[order] = ascending / np.where(larger == 0, 1.0, larger)
    return found


@dataclass(frozen=True)
class NormScale:
    """``|gamma|`` of the norms that a unit passes through (network slimming, Liu et al., ICCV 2017).

    Units that meet no norm with a learnt scale stay.

    Args:
        reduction: over the norms of a unit.
        normalise: ``"none"``, or by the mean over ``"layer"`` (each norm), ``"group"`` or ``"global"``.

    Raises:
        ValueError: when called: the network has no such norm.
    """

    reduction: Reduction = "mean"
    normalise: Normalise = "none"
    statistic = None

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        scales = norm_scales(graph, model)
        if not scales:
            raise ValueError(
                "NormScale ranks by the scales of norms, and no filter of this network meets one; use L2 or IPAD"
            )
        pieces = [(units, plain(model.get_parameter(name).abs())) for name, units in scales.items()]
        return reduced(graph, pieces, self.reduction, self.normalise)


@dataclass(frozen=True)
class Random:
    """The baseline that every criterion has to beat. The same seed and network give the same scores.

    Example:
        >>> graph = ChannelGraph(3, {}, {}, {}, {}, {})
        >>> bool((Random(1)(graph, nn.Identity(), {}) == Random(1)(graph, nn.Identity(), {})).all())
        True
    """

    seed: int = 0
    statistic = None

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        return np.random.default_rng([self.seed, graph.num_units]).random(graph.num_units)
