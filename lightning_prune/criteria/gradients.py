"""Taylor expansion of the loss: criteria that look at the gradients of normal training steps (level 3).

Nothing is run for them: before each optimizer step the callback shows :class:`Gradients` what the step's
backward left in ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import NOTHING, Importance, Statistics, Values
from lightning_prune.criteria.reduction import (
    Normalise,
    Reduction,
    Scope,
    in_scope,
    norm_scales,
    plain,
    reduced,
    rows,
)
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.arguments import check_option

__all__ = ["Gradients", "TaylorGate", "TaylorWeight"]

MISSING = (
    "Taylor ranks by gradients and got none: no optimizer step was seen since the last cut, or no weight has a "
    "finite gradient. Train for at least one epoch before the cut (start_epoch), unfreeze what is to be pruned, "
    "or use a criterion without gradients"
)


@dataclass(frozen=True)
class GradientSource:
    """What one entry of the statistics is made from.

    Attributes:
        units: unit of each value.
        parameters: without the gradient of all of them there is no value.
        score: makes the values of one step, shape (len(units),).
    """

    units: Units
    parameters: tuple[nn.Parameter, ...]
    score: Callable[[], Tensor]


class Gradients:
    """Sums over training steps of scores that need gradients, in O(channels) memory.

    Steps whose gradients are not finite (a scaler that found its scale too large) do not count.

    Args:
        sources: name -> what to sum up.

    Example:
        >>> import numpy as np
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> graph = ChannelGraph(2, {}, {"weight": np.arange(2)}, {"weight": 0}, {}, {})
        >>> gradients = TaylorWeight().gather(graph, layer)
        >>> layer(torch.tensor([[3.0]])).sum().backward()
        >>> gradients.update()
        >>> expected = (layer.weight * 3).square().flatten().detach().numpy()
        >>> bool(np.allclose(gradients.compute()["weight:0"], expected))
        True
    """

    def __init__(self, sources: Mapping[str, GradientSource]) -> None:
        self.active = True
        self.sources = dict(sources)
        self.sums: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Add the gradients that there are now; of ``parameters`` only, if given (those of one optimizer)."""
        known = None if parameters is None else {id(parameter) for parameter in parameters}
        for name, source in self.sources.items() if self.active else ():
            held = source.parameters
            seen = known is None or all(id(p) in known for p in held)
            if seen and all(p.grad is not None for p in held):
                self._add(name, source.score().float())

    def _add(self, name: str, values: Tensor) -> None:
        finite = values.isfinite().all()  # on the device: nobody waits
        self.sums[name] = self.sums.get(name, 0) + torch.where(finite, values, 0)
        self.steps[name] = self.steps.get(name, 0) + finite.long()

    def detach(self) -> None:
        """Stop to look."""
        self.active = False

    def compute(self) -> dict[str, Values]:
        """Sums of what had gradients. In a distributed run these are already those of all processes."""
        return {name: plain(sums) for name, sums in self.sums.items() if int(self.steps[name])}

    def state(self) -> dict[str, Any]:
        """The sums so far, for a checkpoint."""
        return {"sums": dict(self.sums), "steps": dict(self.steps)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            ValueError: it is of other layers.
        """
        if not state["sums"].keys() <= self.sources.keys():
            raise ValueError(
                f"gradients of {sorted(state['sums'])}, but the layers are {sorted(self.sources)}"
            )
        for kept, saved in (self.sums, state["sums"]), (self.steps, state["steps"]):
            kept.update({name: v.to(self.sources[name].parameters[0].device) for name, v in saved.items()})


def _scored(
    graph: ChannelGraph,
    units: Mapping[str, Units],
    statistics: Statistics,
    reduction: Reduction,
    normalise: Normalise,
) -> Importance:
    """What was gathered, reduced to units; those without gradients stay."""
    pieces = [(units[name], statistics[name]) for name in units if name in statistics]
    if not pieces:
        raise ValueError(MISSING)
    return reduced(graph, pieces, reduction, normalise)


@dataclass(frozen=True)
class TaylorWeight:
    """First-order Taylor on weights: ``sum_steps sum |w * dL/dw|^p`` over a filter (Molchanov et al., CVPR 2019).

    Gradients are those of the training steps themselves, over all devices, before clipping. Frozen layers, which
    have none, keep their filters.

    Args:
        p: 2 as published (there: per weight), 1 for the absolute values.
        reduction: over what speaks for a unit.
        scope: ``"filters"``, or ``"bound"``: norm scales and the input slices of consumers too.
        normalise: ``"none"``, or by the mean over ``"layer"``, ``"group"`` or ``"global"``.

    Raises:
        ValueError: an argument is out of range; when called: there are no gradients.

    Example:
        >>> TaylorWeight(p=3)
        Traceback (most recent call last):
        ValueError: p must be 1 or 2, got 3
    """

    p: int = 2
    reduction: Reduction = "mean"
    scope: Scope = "filters"
    normalise: Normalise = "none"
    statistic = None

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {self.p}")
        check_option("scope", self.scope, Scope)

    def gather(self, graph: ChannelGraph, model: nn.Module) -> Gradients:
        """What sums up the scores, while training goes on."""
        return Gradients(
            {
                f"{name}:{dim}": GradientSource(
                    units, (weight := model.get_parameter(name),), self._score(weight, dim)
                )
                for name, dim, units in in_scope(graph, model, self.scope)
            }
        )

    def _score(self, weight: nn.Parameter, dim: int) -> Callable[[], Tensor]:
        return lambda: (rows(weight, dim) * rows(weight.grad, dim)).abs().pow(self.p).sum(1)  # type: ignore[arg-type]

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        units = {f"{name}:{dim}": units for name, dim, units in in_scope(graph, model, self.scope)}
        return _scored(graph, units, statistics, self.reduction, self.normalise)


@dataclass(frozen=True)
class TaylorGate:
    """First-order Taylor on a gate after the norm: ``sum_steps (dL/dz)^2`` at ``z = 1`` (Molchanov et al., 2019).

    No gate is put in: where a channel is ``z * (gamma * x + beta)``, its gate's gradient is
    ``gamma * dL/dgamma + beta * dL/dbeta``, exactly. Where no norm with a learnt scale follows, the gate is on the
    layer's output, ``sum w * dL/dw + b * dL/db``.

    Args:
        reduction: over the gates of a unit.
        normalise: ``"none"``, or by the mean over ``"layer"`` (each gate), ``"group"`` or ``"global"``.

    Raises:
        ValueError: when called: there are no gradients.
    """

    reduction: Reduction = "mean"
    normalise: Normalise = "none"
    statistic = None

    def gather(self, graph: ChannelGraph, model: nn.Module) -> Gradients:
        """What sums up the scores, while training goes on."""
        return Gradients(gates(graph, model))

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NOTHING) -> Importance:
        """Importance per unit, shape (num_units,)."""
        units = {name: source.units for name, source in gates(graph, model).items()}
        return _scored(graph, units, statistics, self.reduction, self.normalise)


def gates(graph: ChannelGraph, model: nn.Module) -> dict[str, GradientSource]:
    """The gates of all units: after norms, and on the outputs of layers whose units meet no norm."""
    after = norm_scales(graph, model)
    behind = {int(unit) for units in after.values() for unit in units}
    alone = {name: units for name, units in graph.layers.items() if not behind.intersection(units.tolist())}
    dims = {**dict.fromkeys(after, 0), **graph.filter_dims}
    return {name: _gate(model, name, dims[name], units) for name, units in {**after, **alone}.items()}


def _gate(model: nn.Module, name: str, dim: int, units: Units) -> GradientSource:
    weight = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    bias = getattr(owner, "bias", None)
    bias = bias if isinstance(bias, nn.Parameter) and len(bias) == len(units) else None
    held = (weight,) if bias is None else (weight, bias)

    def score() -> Tensor:
        gate = (rows(weight, dim) * rows(weight.grad, dim)).sum(1)  # type: ignore[arg-type]
        if bias is not None and bias.grad is not None:
            gate = gate + bias * bias.grad
        return gate.square()

    return GradientSource(units, held, score)
