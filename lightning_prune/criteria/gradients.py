"""First-order Taylor criteria: scores from the gradients of the normal training steps.

Nothing is run for them: before each optimizer step the callback calls :meth:`Gradients.on_step`, which reads
``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import NO_STATISTICS, Importance, Observer, Statistics, Values
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
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.modules import stored_tensor

__all__ = ["Gradients", "TaylorGate", "TaylorWeight"]

MISSING = (
    "Taylor ranks by gradients, but there are none: no optimizer step was observed since the last cut, or no weight "
    "has a finite gradient. In training, cut after at least one epoch (start_epoch) and unfreeze the layers to "
    "prune. Without a trainer, pass batches and a loss to one_shot, or the result of an observer of the criterion. "
    "Or use a criterion without gradients"
)


@dataclass(frozen=True)
class GradientSource:
    """Source of one entry of the statistics.

    Attributes:
        units: unit of each value.
        parameters: those whose gradients are all needed.
        score: returns the values of one step, shape (len(units),).
    """

    units: Units
    parameters: tuple[nn.Parameter, ...]
    score: Callable[[], Tensor]


class Gradients:
    """Observer that sums scores from gradients over training steps, in O(channels) memory.

    Steps whose gradients are not finite (after an overflow under a gradient scaler) are skipped.

    Args:
        sources: name -> source of the values to sum.

    Example:
        >>> import numpy as np
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> graph = ChannelGraph(2, {}, {"weight": np.arange(2)}, {"weight": 0}, {}, {})
        >>> gradients = TaylorWeight().observer(graph, layer)
        >>> layer(torch.tensor([[3.0]])).sum().backward()
        >>> gradients.on_step(layer.parameters())
        >>> expected = (layer.weight * 3).square().flatten().detach().numpy()
        >>> bool(np.allclose(gradients.compute()["weight:0"], expected))
        True
    """

    observes_steps = True

    def __init__(self, sources: Mapping[str, GradientSource]) -> None:
        self.active = True
        self.sources = dict(sources)
        self.sums: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}
        self._marked: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def attach(self) -> Gradients:
        """Start to observe; no hooks are needed."""
        self.active = True
        return self

    @torch.no_grad()
    def on_step(self, parameters: Iterable[Tensor]) -> None:
        """Add the gradients of ``parameters``, those of the optimizer that is about to step."""
        stepping = {id(parameter) for parameter in parameters}
        for name, source in self.sources.items() if self.active else ():
            if all(id(p) in stepping and p.grad is not None for p in source.parameters):
                self._add(name, source.score().float())

    def _add(self, name: str, values: Tensor) -> None:
        finite = values.isfinite().all()  # stays on the device: no synchronisation
        self.sums[name] = self.sums.get(name, 0) + torch.where(finite, values, 0)
        self.steps[name] = self.steps.get(name, 0) + finite.long()

    def mark(self) -> None:
        """Remember the present sums, for :meth:`rewind`."""
        self._marked = dict(self.sums), dict(self.steps)

    def rewind(self) -> None:
        """Go back to the sums of the last :meth:`mark`."""
        self.sums, self.steps = map(dict, self._marked)

    def detach(self) -> None:
        """Stop observing."""
        self.active = False

    def compute(self) -> dict[str, Values]:
        """Return the sums of all sources that had gradients; gradients are already reduced over processes."""
        return {name: plain(sums) for name, sums in self.sums.items() if int(self.steps[name])}

    def state(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        return {"sums": dict(self.sums), "steps": dict(self.steps)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: the state belongs to other layers.
        """
        if not state["sums"].keys() <= self.sources.keys():
            raise ValueError(
                f"gradients of {sorted(state['sums'])}, but the layers are {sorted(self.sources)}"
            )
        for target, saved in (self.sums, state["sums"]), (self.steps, state["steps"]):
            target.update({name: v.to(self.sources[name].parameters[0].device) for name, v in saved.items()})


def _importance(
    graph: ChannelGraph,
    units: Mapping[str, Units],
    statistics: Statistics,
    reduction: Reduction,
    normalise: Normalise,
) -> Importance:
    """Reduce the statistics to units; units without gradients are never removed."""
    pieces = [(units[name], statistics[name]) for name in units if name in statistics]
    if not pieces:
        raise ValueError(MISSING)
    return reduced(graph, pieces, reduction, normalise)


@dataclass(frozen=True)
class TaylorWeight:
    """First-order Taylor on weights: ``sum_steps sum |w * dL/dw|^p`` over a filter (Molchanov et al., CVPR 2019).

    Gradients are those of the training steps, over all devices, before clipping. Frozen layers, which have none,
    keep their filters.

    Args:
        p: 2 as published (there: per weight), 1 for the absolute values.
        reduction: over the slices that belong to a unit.
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

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {self.p}")
        check_choice("scope", self.scope, get_args(Scope))

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer:
        """Return an observer that sums the scores over training steps."""
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

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        units = {f"{name}:{dim}": units for name, dim, units in in_scope(graph, model, self.scope)}
        return _importance(graph, units, statistics, self.reduction, self.normalise)


@dataclass(frozen=True)
class TaylorGate:
    """First-order Taylor on a gate after the norm: ``sum_steps (dL/dz)^2`` at ``z = 1`` (Molchanov et al., 2019).

    No gate is inserted: where a channel is ``z * (gamma * x + beta)``, the gate's gradient is exactly
    ``gamma * dL/dgamma + beta * dL/dbeta``. Where no norm with a learnt scale follows, the gate is on the layer's
    output, ``sum w * dL/dw + b * dL/db``.

    Args:
        reduction: over the gates of a unit.
        normalise: ``"none"``, or by the mean over ``"layer"`` (each gate), ``"group"`` or ``"global"``.

    Raises:
        ValueError: when called: there are no gradients.

    Example:
        >>> import numpy as np
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> graph = ChannelGraph(2, {}, {"weight": np.arange(2)}, {"weight": 0}, {}, {})
        >>> gradients = TaylorGate().observer(graph, layer)
        >>> layer(torch.tensor([[3.0]])).sum().backward()
        >>> gradients.on_step(layer.parameters())
        >>> expected = (layer.weight * 3).square().flatten().detach().numpy()
        >>> bool(np.allclose(TaylorGate()(graph, layer, gradients.compute()), expected))
        True
    """

    reduction: Reduction = "mean"
    normalise: Normalise = "none"

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer:
        """Return an observer that sums the scores over training steps."""
        return Gradients({name: gate.source() for name, gate in gates(graph, model).items()})

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        units = {name: gate.units for name, gate in gates(graph, model).items()}
        return _importance(graph, units, statistics, self.reduction, self.normalise)


@dataclass(frozen=True)
class Gate:
    """A gate on the channels that one weight produces or scales.

    Attributes:
        units: unit of each channel.
        weight: the scale of a norm, or the weight of a layer.
        bias: that goes with it, if there is one.
        dim: dimension of ``weight`` along which the channels lie.
    """

    units: Units
    weight: nn.Parameter
    bias: nn.Parameter | None
    dim: int

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def gradient(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Return ``sum w * dL/dw + b * dL/db`` of each channel, from gradients by identity of the parameter."""
        if id(self.weight) not in gradients:
            return torch.zeros(len(self.units), device=self.weight.device)
        gate = (rows(self.weight, self.dim) * rows(gradients[id(self.weight)], self.dim)).sum(1)
        if self.bias is None or id(self.bias) not in gradients:
            return gate
        return gate + self.bias.detach() * gradients[id(self.bias)]

    def source(self) -> GradientSource:
        """Return the squared gradients at the gate in the normal training steps."""

        def score() -> Tensor:
            return self.gradient({id(p): p.grad for p in self.parameters if p.grad is not None}).square()

        return GradientSource(self.units, self.parameters, score)


def gates(graph: ChannelGraph, model: nn.Module) -> dict[str, Gate]:
    """Return the gates of all units: after norms, and on the outputs of layers whose units pass no norm."""
    scales = norm_scales(graph, model)
    normed = {int(unit) for units in scales.values() for unit in units}
    bare = {name: units for name, units in graph.layers.items() if not normed.intersection(units.tolist())}
    dims = {**dict.fromkeys(scales, 0), **graph.filter_dims}
    return {name: _gate(model, name, dims[name], units) for name, units in {**scales, **bare}.items()}


def _gate(model: nn.Module, name: str, dim: int, units: Units) -> Gate:
    owner = model.get_submodule(name.rpartition(".")[0])
    bias = stored_tensor(owner, "bias")
    bias = bias if isinstance(bias, nn.Parameter) and len(bias) == len(units) else None
    return Gate(units, model.get_parameter(name), bias, dim)
