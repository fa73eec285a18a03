"""Which units matter least: criteria that score every unit (level 3).

A criterion is any callable ``(graph, model, statistics) -> importance``, shape (num_units,), lowest goes
first; a plain function or lambda will do. It may carry an attribute ``statistic``, which makes the metric
that the callback gathers for it (``None``: nothing is gathered; absent: activation deviation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchmetrics import Metric

from lightning_prune.graph import ChannelGraph
from lightning_prune.statistics import ActivationDeviation, Form, Statistics, check_form

__all__ = [
    "IPAD",
    "L1",
    "L2",
    "Criterion",
    "Importance",
    "Random",
    "Reduction",
    "filter_norms",
    "ipad",
    "per_unit",
]

Importance = NDArray[np.float64]
NOTHING: Statistics = MappingProxyType({})
Reduction = Literal["mean", "sum", "max"]
#: one value per filter, by the qualified name of the weight
PerFilter = Mapping[str, NDArray[np.float64]]


class Criterion(Protocol):
    """Scores every unit of a graph; the lowest goes first."""

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics, /) -> Importance:
        """Importance per unit, shape (num_units,)."""
        ...


def filter_norms(graph: ChannelGraph, model: nn.Module, p: int = 1) -> dict[str, NDArray[np.float64]]:
    """The p-norm of every filter of every layer: ``||W_k||_p`` over everything but the filters' dimension.

    Example:
        >>> graph = ChannelGraph(1, {}, {"weight": np.array([0])}, {"weight": 0}, {}, {})
        >>> model = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> filter_norms(graph, model, p=2)
        {'weight': array([5.])}
    """
    return {name: _norms(model.get_parameter(name), graph.filter_dims[name], p) for name in graph.layers}


def _norms(weight: torch.Tensor, dim: int, p: int) -> NDArray[np.float64]:
    filters = weight.detach().movedim(dim, 0).flatten(1)
    precise = filters.to(torch.promote_types(filters.dtype, torch.float32))
    return torch.linalg.vector_norm(precise, p, dim=1).cpu().numpy().astype(np.float64)


def fan_ins(graph: ChannelGraph, model: nn.Module) -> dict[str, int]:
    """Weights per filter of each layer: ``n_l = C_in * kh * kw``."""
    return {name: model.get_parameter(name).numel() // len(units) for name, units in graph.layers.items()}


def per_unit(graph: ChannelGraph, scores: PerFilter, reduction: Reduction = "mean") -> Importance:
    """Reduce scores of filters to scores of units, over the filters that go together.

    Args:
        graph: says which filters belong to which unit.
        scores: qualified name of a weight -> score per filter; layers may be missing.
        reduction: ``"mean"``, ``"sum"`` or ``"max"``.

    Returns:
        Shape (num_units,); infinite (never the least important) for units without a scored filter.

    Example:
        >>> layers = {"a": np.array([0, 1]), "b": np.array([1, 0])}
        >>> graph = ChannelGraph(3, {}, layers, {"a": 0, "b": 0}, {}, {})
        >>> per_unit(graph, {"a": np.array([1.0, 2.0]), "b": np.array([4.0, 3.0])})
        array([ 2.,  3., inf])
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    units = np.concatenate([graph.layers[name] for name in scores] or [np.empty(0, np.int64)])
    values = np.concatenate(list(scores.values()) or [np.empty(0)])
    number = np.bincount(units, minlength=graph.num_units)
    if reduction == "max":
        out = np.full(graph.num_units, -np.inf)
        np.maximum.at(out, units, values)
    else:
        out = np.bincount(units, weights=values, minlength=graph.num_units)
        out = out / np.maximum(number, 1) if reduction == "mean" else out
    return np.where(number > 0, out, np.inf)


def _share(scores: PerFilter) -> dict[str, NDArray[np.float64]]:
    """Each score as a share of the sum over the network (unchanged where that is zero)."""
    total = sum(float(values.sum()) for values in scores.values()) or 1.0
    return {name: values / total for name, values in scores.items()}


def _deviations(graph: ChannelGraph, statistics: Statistics) -> dict[str, NDArray[np.float64]]:
    """Deviations of all layers; one that was not observed gets the network's mean: neither high nor low."""
    seen = [statistics[name] for name in graph.layers if name in statistics]
    if not seen:
        raise ValueError(
            "IPAD with omega < 1 needs activation statistics and got none: did any batch run? "
            "Hooks see nothing inside torch.compile; there, gather in a pass of its own (statistics='pass')"
        )
    neutral = float(np.concatenate(seen).mean())
    return {name: statistics.get(name, np.full(len(units), neutral)) for name, units in graph.layers.items()}


def ipad(
    graph: ChannelGraph,
    model: nn.Module,
    statistics: Statistics = NOTHING,
    omega: float = 0.5,
    p: int = 1,
    scale: float | Literal["global"] = 10.0,
    reduction: Reduction = "mean",
) -> Importance:
    """IPAD: ``omega / n_l * ||W_k||_p + (1 - omega) * scale * ADC_k`` (Vitek et al., JKSU-CIS 35(8), 2023).

    Departures from the published code: the deviation is that of the training data (there, of a batch of zeros
    after the first filter), and no noise breaks ties.

    Args:
        graph: the units.
        model: the traced module, for its weights.
        statistics: activation deviation per filter; not needed with ``omega=1``.
        omega: weight of the filters' norms against their activations, in [0, 1].
        p: norm of the weights.
        scale: equaliser of the second term; ``"global"`` divides each term by its sum over the network
            instead, so that omega means what it says.
        reduction: over the filters of a unit.

    Returns:
        Importance per unit, shape (num_units,).

    Raises:
        ValueError: no statistics although omega < 1.
    """
    fan_in = fan_ins(graph, model)
    weights: PerFilter = {n: norm / fan_in[n] for n, norm in filter_norms(graph, model, p).items()}
    if omega == 1:
        return per_unit(graph, weights, reduction)
    deviations: PerFilter = _deviations(graph, statistics)
    if scale == "global":
        weights, deviations, scale = _share(weights), _share(deviations), 1.0
    second = (1 - omega) * scale
    scores = {name: omega * weights[name] + second * deviations[name] for name in graph.layers}
    return per_unit(graph, scores, reduction)


@dataclass(frozen=True)
class IPAD:
    """Iterative pruning with activation deviation; see :func:`ipad` for the formula.

    Args:
        omega: 1 looks at weights only (nothing is gathered), 0 at activations only.
        p: 1 or 2, for both terms.
        deviation: for ``p=2``, ``"fair"`` or ``"published"`` (biased by resolution).
        scale: the equaliser, or ``"global"``.
        reduction: over the filters of a unit: ``"mean"``, ``"sum"`` or ``"max"``.
        grid: cells per side in which mean maps are kept; ``None`` for whole maps.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> IPAD(omega=2)
        Traceback (most recent call last):
        ValueError: omega must lie in [0, 1], got 2
    """

    omega: float = 0.5
    p: int = 1
    deviation: Form = "fair"
    scale: float | Literal["global"] = 10.0
    reduction: Reduction = "mean"
    grid: int | None = 16

    def __post_init__(self) -> None:
        check_form(self.p, self.deviation)
        if not 0 <= self.omega <= 1:
            raise ValueError(f"omega must lie in [0, 1], got {self.omega}")
        if isinstance(self.scale, str) and self.scale != "global":
            raise ValueError(f"scale must be a number or 'global', got {self.scale!r}")

    @property
    def statistic(self) -> Callable[[], Metric] | None:
        """What to gather: the deviation of activations, unless they carry no weight."""
        if self.omega == 1:
            return None
        return partial(ActivationDeviation, p=self.p, form=self.deviation, grid=self.grid)

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        return ipad(graph, model, statistics, self.omega, self.p, self.scale, self.reduction)


@dataclass(frozen=True)
class Norm:
    """Size of the filters: ``||W_k||_p``, reduced over the filters of a unit."""

    p: int = 2
    reduction: Reduction = "mean"
    statistic = None

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        return per_unit(graph, filter_norms(graph, model, self.p), self.reduction)


@dataclass(frozen=True)
class L1(Norm):
    """Sum of a filter's absolute weights (Li et al., 2017)."""

    p: int = field(default=1, init=False)


@dataclass(frozen=True)
class L2(Norm):
    """Euclidean norm of a filter's weights."""

    p: int = field(default=2, init=False)


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
