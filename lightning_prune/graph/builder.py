"""Builds the channel graph from a finished trace: ids that are tied become units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace, Multiple
from lightning_prune.graph.costs import Term
from lightning_prune.graph.pins import optional_parts
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.tracker import Tracker
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.module_walk import named_modules, named_parameters
from lightning_prune.utils.vanished import vanished_parameters

__all__ = ["build_graph"]

#: Returns the unit of each id, -1 for ids without a unit.
UnitsOf = Callable[[Ids], Units]


def build_graph(
    tracker: Tracker, modes: tuple[bool, ...], notes: list[str], examples: tuple[Example, ...]
) -> ChannelGraph:
    """Build the channel graph of a trace: number the units, and translate ids to units everywhere.

    Args:
        tracker: of the finished trace.
        modes: values of ``training`` in which the forward ran.
        notes: for the user.
        examples: inputs of the traced forwards.
    """
    components = tracker.ties.components()
    dimensions = _Dimensions.of(tracker)
    unit_of = _number_units(tracker, components, dimensions)

    unit_of_id = unit_of[components]

    def units(ids: Ids) -> Units:
        return unit_of_id[ids.numpy()]

    bindings, layers = _bindings(dimensions, unit_of_id), _layers(tracker, units)
    pinned, pinned_components = _pinned(tracker, components, unit_of)
    return ChannelGraph(
        num_units=int(unit_of.max(initial=-1)) + 1,
        bindings=bindings,
        layers=layers,
        filter_dims={name: tracker.filters[name] for name in layers},
        pinned=pinned,
        terms={"macs": _macs_terms(tracker, units), "params": _params_terms(tracker, bindings)},
        unsupported=tracker.unsupported,
        statistics_units=_statistics_units(tracker, units),
        notes=notes,
        types={name: type(module) for name, module in named_modules(tracker.model)},
        optional=_optional_units(tracker.model, layers),
        multiples=_multiples(tracker, units),
        gone=vanished_parameters(tracker.model),
        evidence=DenseTrace(examples, tracker, modes, components, unit_of, pinned_components),
    )


@dataclass(frozen=True)
class _Dimensions:
    """All dimensions of all parameters and buffers, with their ids in one array.

    Attributes:
        places: name and number of each dimension.
        ids: of all dimensions, one after the other.
        ends: where those of each dimension end.
    """

    places: list[tuple[str, int]]
    ids: Units
    ends: Units

    @classmethod
    def of(cls, tracker: Tracker) -> _Dimensions:
        places = [(name, dim) for name, dims in tracker.sources.items() for dim in dims]
        arrays = [ids for dims in tracker.sources.values() for ids in dims.values()]
        ends = np.cumsum(list(map(len, arrays)), dtype=np.int64)
        return cls(places, torch.cat([*arrays, torch.empty(0, dtype=torch.int64)]).numpy(), ends)

    def counts(self, mask: NDArray[np.bool_]) -> Units:
        """Return how often ``mask``, which has an entry for each of ``ids``, is True in each dimension."""
        total = np.append(0, np.cumsum(mask))
        return np.diff(total[np.append(0, self.ends)])


def _number_units(tracker: Tracker, components: Units, dimensions: _Dimensions) -> Units:
    """Return the unit of each component of tied ids, -1 for components without a unit.

    Components with filters have the lowest numbers. Then come the components that share a dimension of a parameter
    with filters. All others have no unit.
    """
    has_filter = np.zeros(components.max(initial=-1) + 1, dtype=bool)
    for name, dim in tracker.filters.items():
        has_filter[components[tracker.sources[name][dim].numpy()]] = True
    has_unit, of_ids = has_filter.copy(), components[dimensions.ids]
    with_filter, sizes = dimensions.counts(has_filter[of_ids]), np.diff(dimensions.ends, prepend=0)
    is_mixed = (with_filter > 0) & (with_filter < sizes)
    has_unit[of_ids[np.repeat(is_mixed, sizes)]] = True
    numbers = np.full(len(has_filter), -1, dtype=np.int64)
    numbers[has_filter] = np.arange(has_filter.sum())
    others = has_unit & ~has_filter
    numbers[others] = np.arange(others.sum()) + has_filter.sum()
    return numbers


def _layers(tracker: Tracker, units: UnitsOf) -> dict[str, Units]:
    """Return the unit of each filter of each weight, in the order of the model's tensors."""
    filters = tracker.filters
    return {name: units(dims[filters[name]]) for name, dims in tracker.sources.items() if name in filters}


def _bindings(dimensions: _Dimensions, unit_of_id: Units) -> dict[str, dict[int, Units]]:
    units = unit_of_id[dimensions.ids]
    numbers_without = dimensions.counts(units < 0).tolist()
    bindings: dict[str, dict[int, Units]] = {}
    start = 0
    for (name, dim), end, without in zip(
        dimensions.places, dimensions.ends.tolist(), numbers_without, strict=True
    ):
        if end > start and not without:
            bindings.setdefault(name, {})[dim] = units[start:end].copy()  # without the memory of all
        start = end
    return bindings


def _pinned(tracker: Tracker, components: Units, unit_of: Units) -> tuple[dict[int, str], NDArray[np.bool_]]:
    """Return the first reason of each pinned unit, and a mask of the pinned components."""
    reasons: dict[int, str] = {}
    mask = np.zeros(len(unit_of), dtype=bool)
    for pin in tracker.ties.pins:
        reason = f"{pin.reason} ({pin.where})" if pin.where else pin.reason
        pin_components = components[pin.ids.numpy()]
        mask[pin_components] = True
        for unit in np.unique(unit_of[pin_components]).tolist():
            if unit >= 0:
                reasons.setdefault(unit, reason)
    return reasons, mask


def _statistics_units(tracker: Tracker, units: UnitsOf) -> Units:
    """Return the units over which an operator takes statistics across channels."""
    arrays = [units(ids) for ids in tracker.ties.statistics]
    unique = np.unique(np.concatenate([*arrays, np.empty(0, np.int64)]))
    return unique[unique >= 0]


def _multiples(tracker: Tracker, units: UnitsOf) -> list[Multiple]:
    """Return the dimensions whose size must stay a multiple of a number, each of them once."""
    unique: dict[tuple[bytes, int], Multiple] = {}
    for each in tracker.multiples:
        dim_units = units(each.ids)
        if (dim_units >= 0).any():
            unique.setdefault(
                (dim_units.tobytes(), each.multiple), Multiple(dim_units, each.multiple, each.where)
            )
    return list(unique.values())


def _optional_units(model: nn.Module, layers: dict[str, Units]) -> list[Units]:
    """Return, for each part that may vanish, the units whose filters are all in that part.

    A part that is the last of its set with filters may not vanish.
    """
    optional = []
    for parts in optional_parts(model):
        remaining = [part for part in parts if _layers_inside(layers, part)]
        if len(remaining) > 1:
            optional += [_units_only_inside(layers, part) for part in remaining]
    return optional


def _units_only_inside(layers: dict[str, Units], part: str) -> Units:
    inside = _layers_inside(layers, part)
    outside = [units for name, units in layers.items() if name not in inside]
    return np.setdiff1d(
        np.concatenate(list(inside.values())), np.concatenate([*outside, np.empty(0, np.int64)])
    )


def _layers_inside(layers: dict[str, Units], part: str) -> dict[str, Units]:
    return {name: units for name, units in layers.items() if name.startswith(f"{part}.")}


def _macs_terms(tracker: Tracker, units: UnitsOf) -> list[Term]:
    terms = []
    for cost in tracker.costs:
        factors = [units(ids) for ids in cost.factors]
        shrinks = [np.count_nonzero(factor >= 0) == len(factor) for factor in factors]
        fixed = prod(len(factor) for factor, may in zip(factors, shrinks, strict=True) if not may)
        terms.append(Term(cost.layer, cost.scale * fixed, tuple(compress(factors, shrinks))))
    return terms


def _params_terms(tracker: Tracker, bindings: dict[str, dict[int, Units]]) -> list[Term]:
    terms = []
    for name, parameter in named_parameters(tracker.model):
        factors = bindings.get(name, {})
        fixed = prod(size for dim, size in enumerate(parameter.shape) if dim not in factors)
        terms.append(Term(name, fixed, tuple(factors.values())))
    return terms
