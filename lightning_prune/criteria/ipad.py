"""IPAD: a mix of the filters' norms and their activation deviation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.criteria.activation_deviation import ActivationDeviation, Form, check_form
from lightning_prune.criteria.base import NO_STATISTICS, Importance, Observer, Statistics
from lightning_prune.criteria.collector import Collector
from lightning_prune.criteria.consumers import ConsumerInputs
from lightning_prune.criteria.energy import output_energy, weight_energy
from lightning_prune.criteria.reduction import (
    Normalise,
    PerFilter,
    Reduction,
    by_mean,
    filter_norms,
    groups,
    per_unit,
    remaining_shares,
)
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.utils.arguments import check_choice

__all__ = ["IPAD", "Deviation", "Terms", "default_criterion", "energy_importance", "ipad_importance"]

Terms = Literal["deviation", "energy"]


def fan_ins(graph: ChannelGraph, model: nn.Module) -> dict[str, int]:
    """Return the number of weights per filter of each layer, ``n_l = C_in * kh * kw``."""
    return {name: model.get_parameter(name).numel() // len(units) for name, units in graph.layers.items()}


def _share(scores: PerFilter) -> dict[str, NDArray[np.float64]]:
    """Divide each score by the sum over the network; leave the scores unchanged where that is zero."""
    total = sum(float(values.sum()) for values in scores.values()) or 1.0
    return {name: values / total for name, values in scores.items()}


def _deviations(graph: ChannelGraph, statistics: Statistics) -> dict[str, NDArray[np.float64]]:
    """Return the deviations of all layers; a layer that was not observed gets the mean of the network."""
    observed = [statistics[name] for name in graph.layers if name in statistics]
    if not observed:
        raise ValueError(
            "IPAD with omega < 1 needs activation statistics, but no layer was observed: did any batch run? "
            "Forward hooks do not run inside torch.compile; there, use a separate pass (statistics='pass')"
        )
    neutral = float(np.concatenate(observed).mean())
    return {name: statistics.get(name, np.full(len(units), neutral)) for name, units in graph.layers.items()}


def ipad_importance(
    graph: ChannelGraph,
    model: nn.Module,
    statistics: Statistics = NO_STATISTICS,
    omega: float = 0.5,
    p: int = 1,
    scale: float | Literal["global"] = 10.0,
    reduction: Reduction = "mean",
    normalise: Normalise = "none",
) -> Importance:
    """Return IPAD importance: ``omega / n_l * ||W_k||_p + (1 - omega) * scale * ADC_k`` (Vitek et al., 2023).

    Journal of King Saud University - Computer and Information Sciences 35(8). It departs from the published code in
    two points: the deviation is that of the training data (there, of a batch of zeros after the first filter), and
    ties are not broken by noise.

    Args:
        graph: the units.
        model: the traced module, for its weights.
        statistics: activation deviation per filter; not needed with ``omega=1``.
        omega: weight of the filters' norms against their activations, in [0, 1].
        p: norm of the weights.
        scale: equaliser of the second term; ``"global"`` divides each term by its sum over the network
            instead, so that both terms have one scale.
        reduction: over the filters of a unit.
        normalise: ``"layer"``, ``"group"`` or ``"global"``: divide by the mean over it.

    Returns:
        Importance per unit, shape (num_units,).

    Raises:
        ValueError: no statistics although omega < 1.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, -2.0]])
        >>> graph = ChannelGraph(1, {}, {"weight": np.array([0])}, {"weight": 0}, {}, {})
        >>> ipad_importance(graph, layer, omega=1.0)
        array([1.5])
    """
    fan_in = fan_ins(graph, model)
    weights: PerFilter = {n: norm / fan_in[n] for n, norm in filter_norms(graph, model, p).items()}
    if omega == 1:
        return per_unit(graph, weights, reduction, normalise)
    deviations: PerFilter = _deviations(graph, statistics)
    if scale == "global":
        weights, deviations, scale = _share(weights), _share(deviations), 1.0
    second = (1 - omega) * scale
    scores = {name: omega * weights[name] + second * deviations[name] for name in graph.layers}
    return per_unit(graph, scores, reduction, normalise)


def energy_importance(
    graph: ChannelGraph,
    model: nn.Module,
    statistics: Statistics = NO_STATISTICS,
    omega: float = 0.5,
    beta: float = 0.5,
) -> Importance:
    """Return ``omega * P_u + (1 - omega) * A_u``, two shares of the consumers' output energy, by group.

    P is the share that the weights alone predict (:func:`weight_energy`), A the one that is measured
    (:func:`output_energy`). Both are divided by their mean in each group of coupled layers, so that omega is the
    weight of the one against the other. Groups are compared by :func:`remaining_shares` of the sum.

    Args:
        graph: the units.
        model: the traced module, for its weights.
        statistics: variances of what layers read; not needed with ``omega=1``.
        omega: weight of P against A, in [0, 1].
        beta: see :func:`remaining_shares`.

    Returns:
        Importance per unit, shape (num_units,).

    Raises:
        ValueError: no statistics although omega < 1.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> net[0].weight.data, net[2].weight.data = torch.ones(2, 1), torch.tensor([[2.0, 1.0]])
        >>> graph = trace(net, torch.zeros(1, 1))
        >>> first, second = energy_importance(graph, net, omega=1.0)[graph.layers["0.weight"]]
        >>> bool(first > second)
        True
    """
    labels, importance = groups(graph), np.zeros(graph.num_units)
    if omega > 0:
        importance = importance + omega * by_mean(weight_energy(graph, model), labels)
    if omega < 1:
        importance = importance + (1 - omega) * by_mean(output_energy(graph, model, statistics), labels)
    return remaining_shares(graph, importance, beta)


@dataclass(frozen=True)
class IPAD:
    """Iterative pruning with activation deviation; see :func:`ipad_importance` for the formula.

    With ``terms="energy"`` both terms are energies of one scale, and omega alone weighs them: see
    :func:`energy_importance`. It uses ``omega`` and ``beta`` only.

    Args:
        omega: 1 uses weights only (nothing is observed), 0 activations only.
        p: 1 or 2, for both terms.
        deviation: for ``p=2``, ``"fair"`` or ``"published"`` (biased by resolution).
        scale: the equaliser, or ``"global"``.
        reduction: over the filters of a unit: ``"mean"``, ``"sum"`` or ``"max"``.
        grid: cells per side in which mean maps are kept; ``None`` for whole maps.
        normalise: by the mean over ``"layer"``, ``"group"`` or ``"global"``, or ``"none"``.
        terms: ``"deviation"`` (Vitek et al., 2023) or ``"energy"``.
        beta: with ``terms="energy"``: 1 lets wide and narrow layers lose the same share, 0 leaves them the same
            number of units.

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
    normalise: Normalise = "none"
    terms: Terms = "deviation"
    beta: float = 0.5

    def __post_init__(self) -> None:
        check_form(self.p, self.deviation)
        check_choice("terms", self.terms, get_args(Terms))
        if not 0 <= self.omega <= 1:
            raise ValueError(f"omega must lie in [0, 1], got {self.omega}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        if isinstance(self.scale, str) and self.scale != "global":
            raise ValueError(f"scale must be a number or 'global', got {self.scale!r}")

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer | None:
        """Return an observer of the deviation, or of what layers read; None with ``omega=1``."""
        if self.omega == 1:
            return None
        if self.terms == "energy":
            return ConsumerInputs(graph, model)
        statistic = partial(ActivationDeviation, p=self.p, form=self.deviation, grid=self.grid)
        return Collector(graph, model, statistic)

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        if self.terms == "energy":
            return energy_importance(graph, model, statistics, self.omega, self.beta)
        return ipad_importance(
            graph, model, statistics, self.omega, self.p, self.scale, self.reduction, self.normalise
        )


@dataclass(frozen=True)
class Deviation(IPAD):
    """Activation deviation alone: IPAD with omega 0, whose other arguments are those of :class:`IPAD`.

    Example:
        >>> Deviation(p=2, deviation="published").omega
        0.0
    """

    omega: float = field(default=0.0, init=False)
    scale: float | Literal["global"] = field(default=1.0, init=False)
    terms: Terms = field(default="deviation", init=False)
    beta: float = field(default=0.5, init=False)


def default_criterion() -> IPAD:
    """Return the criterion that is used where none is given: the best on validation in docs/results/quality.md."""
    return IPAD(omega=0.25, terms="energy")
