"""The graph of a trace: ids that were tied become units (level 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.graph.costs import Term
from lightning_prune.graph.pins import optional_parts
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.tracker import Tracker

__all__ = ["graph_of"]

#: the units of ids, -1 where there is none
UnitsOf = Callable[[Ids], Units]


def graph_of(
    tracker: Tracker,
    modes: tuple[bool, ...],
    notes: list[str],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ChannelGraph:
    """Number the units of a trace and say what they mean.

    Args:
        tracker: of the trace, which is over.
        modes: train or eval, those that ran.
        notes: for people.
        inputs: of the traced forward.
        kwargs: likewise, by name.
    """
    components = tracker.ties.components()
    unit_of = _number(tracker, components)

    def units(ids: Ids) -> Units:
        return unit_of[components[ids.numpy()]]

    bindings, layers = _bindings(tracker, units), _layers(tracker, units)
    pinned, mask = _pinned(tracker, components, unit_of)
    return ChannelGraph(
        num_units=int(unit_of.max(initial=-1)) + 1,
        bindings=bindings,
        layers=layers,
        filter_dims={name: tracker.filters[name] for name in layers},
        pinned=pinned,
        terms={"macs": _macs(tracker, units), "params": _params(tracker, bindings)},
        unsupported=tracker.unsupported,
        statistics_units=_mixing(tracker, units),
        notes=notes,
        types={name: type(module) for name, module in tracker.model.named_modules()},
        optional=_optional(tracker.model, layers),
        evidence=DenseTrace(inputs, kwargs, tracker, modes, components, unit_of, mask),
    )


def _layers(tracker: Tracker, units: UnitsOf) -> dict[str, Units]:
    """The filters of each weight, in the order of the model's tensors."""
    filters = tracker.filters
    return {name: units(dims[filters[name]]) for name, dims in tracker.sources.items() if name in filters}


def _mixing(tracker: Tracker, units: UnitsOf) -> Units:
    """Units that met an operator which takes statistics across channels."""
    met = [units(ids) for ids in tracker.ties.statistics]
    found = np.unique(np.concatenate([*met, np.empty(0, np.int64)]))
    return found[found >= 0]


def _optional(model: nn.Module, layers: dict[str, Units]) -> list[Units]:
    """For each part that may vanish, the units with filters in nothing but that part."""
    alive = [[part for part in parts if _inside(layers, part)] for parts in optional_parts(model)]
    nothing = np.empty(0, np.int64)
    found = []
    for part in (part for parts in alive for part in parts if len(parts) > 1):
        own = _inside(layers, part)
        others = [units for name, units in layers.items() if name not in own]
        found.append(np.setdiff1d(np.concatenate(list(own.values())), np.concatenate([*others, nothing])))
    return found


def _inside(layers: dict[str, Units], part: str) -> dict[str, Units]:
    return {name: units for name, units in layers.items() if name.startswith(f"{part}.")}


def _number(tracker: Tracker, components: Units) -> Units:
    """Unit of each component, -1 for those that no filter and no neighbour of a filter belongs to."""
    filters = np.zeros(components.max(initial=-1) + 1, dtype=bool)
    for name, dim in tracker.filters.items():
        filters[components[tracker.sources[name][dim].numpy()]] = True
    beside = filters.copy()
    for dims in tracker.sources.values():
        for ids in dims.values():
            own = components[ids.numpy()]
            if filters[own].any():
                beside[own] = True
    # Filters first, so that the units that may go have the low numbers.
    numbers = np.full(len(filters), -1, dtype=np.int64)
    numbers[filters] = np.arange(filters.sum())
    rest = beside & ~filters
    numbers[rest] = np.arange(rest.sum()) + filters.sum()
    return numbers


def _bindings(tracker: Tracker, units: UnitsOf) -> dict[str, dict[int, Units]]:
    found: dict[str, dict[int, Units]] = {}
    for name, dims in tracker.sources.items():
        for dim, ids in dims.items():
            bound = units(ids)
            if len(bound) and (bound >= 0).all():
                found.setdefault(name, {})[dim] = bound
    return found


def _pinned(tracker: Tracker, components: Units, unit_of: Units) -> tuple[dict[int, str], NDArray[np.bool_]]:
    """Unit -> its first reason, and the mask of pinned components."""
    reasons: dict[int, str] = {}
    mask = np.zeros(len(unit_of), dtype=bool)
    for pin in tracker.ties.pins:
        text = f"{pin.reason} ({pin.where})" if pin.where else pin.reason
        own = components[pin.ids.numpy()]
        mask[own] = True
        for unit in np.unique(unit_of[own]).tolist():
            if unit >= 0:
                reasons.setdefault(unit, text)
    return reasons, mask


def _macs(tracker: Tracker, units: UnitsOf) -> list[Term]:
    terms = []
    for cost in tracker.costs:
        bound = [units(ids) for ids in cost.factors]
        shrinking = [factor for factor in bound if (factor >= 0).all()]
        fixed = [len(factor) for factor in bound if not (factor >= 0).all()]
        terms.append(Term(cost.layer, cost.scale * int(np.prod(fixed, dtype=np.int64)), tuple(shrinking)))
    return terms


def _params(tracker: Tracker, bindings: dict[str, dict[int, Units]]) -> list[Term]:
    terms = []
    for name, parameter in tracker.model.named_parameters():
        bound = bindings.get(name, {})
        fixed = [size for dim, size in enumerate(parameter.shape) if dim not in bound]
        terms.append(Term(name, int(np.prod(fixed, dtype=np.int64)), tuple(bound.values())))
    return terms
