"""``trace(model, *inputs) -> ChannelGraph``: follow a network's channels and name its units (level 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.calls import Recording
from lightning_prune.graph import ChannelGraph, Evidence, Term, Units
from lightning_prune.ids import Ids
from lightning_prune.inputs import kept_whole, refusal, unwrapped
from lightning_prune.pins import optional_parts, pinned_tensors
from lightning_prune.recording import raised_in, record
from lightning_prune.rules import follow
from lightning_prune.rules.sized import pin_number, pin_what_sizes_do_not_follow
from lightning_prune.sizes import Attribute, evaluate, leaves
from lightning_prune.tracker import Tracker
from lightning_prune.untouched import uncollected

__all__ = ["TraceError", "analyse", "trace"]

MODES = (False, True)  # eval first: MACs are counted there


class TraceError(RuntimeError):
    """The network could not be traced; nothing was changed."""


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> ChannelGraph:
    """Find what depends on what in ``model`` by following its forward on ``inputs``.

    The forward is run on fake tensors, once in eval and once in train mode (auxiliary heads exist only there).
    Nothing about the model changes, and no arithmetic is done.

    Args:
        model: any eager network.
        *inputs: example inputs, as the forward takes them; their values do not matter, their shapes do:
            MACs are those of one forward on them.
        **kwargs: example keyword inputs.

    Raises:
        TraceError: the forward raises in both modes (the message has the model's own error), or the model is
            quantised, wrapped for distributed training, lazy or scripted (the message says what to do instead).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> len(graph.prunable), graph.cost("params"), graph.cost("params", remove=[0, 1])
        (8, 242, 182)
        >>> graph.pinned[graph.layers["2.weight"][0]]
        "is the network's output"
    """
    if (reason := refusal(model)) is not None:
        raise TraceError(reason)
    with uncollected():
        tracker, modes, notes = analyse(Tracker(model), inputs, kwargs, MODES)
        _link_attributes(tracker)
        pin_what_sizes_do_not_follow(tracker)
        for tensor, reason in [*pinned_tensors(model), *kept_whole(model)]:
            tracker.pin_all([tensor], reason)
        return _graph(tracker, modes, notes, inputs, kwargs)


def analyse(
    tracker: Tracker, inputs: tuple[Any, ...], kwargs: dict[str, Any], modes: Iterable[bool]
) -> tuple[Tracker, tuple[bool, ...], list[str]]:
    """Record the forward in each mode and follow it. MACs come from the first mode that runs."""
    with unwrapped(tracker.model):
        return _analyse(tracker, inputs, kwargs, modes)


def _analyse(
    tracker: Tracker, inputs: tuple[Any, ...], kwargs: dict[str, Any], modes: Iterable[bool]
) -> tuple[Tracker, tuple[bool, ...], list[str]]:
    done: list[bool] = []
    notes: list[str] = []
    error: Exception | None = None
    for training in modes:
        try:
            recording = record(tracker.model, inputs, kwargs, training)
        except Exception as raised:
            error = raised
            notes.append(f"{'train' if training else 'eval'} mode cannot be run: {raised}")
            continue
        _follow(recording, tracker, count=not done)
        done.append(training)
        if recording.real:
            notes.append("needs values to run; the branches that the example input takes were followed")
    if not done:
        raise TraceError(f"the network raises on its example input: {_told(error)}") from error
    return tracker, tuple(done), notes


def _told(error: Exception | None) -> str:
    where = raised_in(error) if error is not None else ""
    return f"{type(error).__name__}: {error}{f' (in {where!r})' if where else ''}"


def _follow(recording: Recording, tracker: Tracker, count: bool) -> None:
    costs = list(tracker.costs)
    for call in recording.calls:
        follow(call, tracker)
    tracker.pin_all(recording.left, "leaves torch for numpy, where it cannot be followed")
    tracker.pin_all(recording.outputs, "is the network's output")
    tracker.outputs += [tensor.shape for tensor in recording.outputs]
    for size in recording.escaped:
        tracker.enters(size)
    for size in recording.numbers:
        pin_number(size, tracker)
    if count:
        tracker.counted = len(tracker.followed)
    else:
        tracker.costs = costs


def _link_attributes(tracker: Tracker) -> None:
    """One attribute cannot have two values: dimensions that it fixes shrink together, in proportion."""
    first: dict[Any, Ids] = {}
    for use in sorted(tracker.uses, key=lambda use: len(use.ids)):
        found = list(leaves(use.size))
        if len(found) == 1 and isinstance(found[0], Attribute) and len(use.ids):
            ids = first.setdefault(found[0].key, use.ids)
            times, rest = divmod(len(use.ids), len(ids))
            if (
                not rest
                and evaluate(use.size, {found[0].key: found[0].value - 1})
                == len(use.ids) - _step(ids, found[0]) * times
            ):
                tracker.ties.tie(ids, tracker.tie_across(use.ids.view(times, -1)), use.where)


def _step(ids: Ids, attribute: Attribute) -> int:
    """How many of ``ids`` one unit of the attribute stands for."""
    return len(ids) // max(attribute.value, 1)


def _graph(
    tracker: Tracker,
    modes: tuple[bool, ...],
    notes: list[str],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ChannelGraph:
    components = tracker.ties.components()
    unit_of = _number(tracker, components)

    def units(ids: Ids) -> Units:
        return unit_of[components[ids.numpy()]]

    bindings = _bindings(tracker, units)
    num_units = int(unit_of.max(initial=-1)) + 1
    pinned, mask = _pinned(tracker, components, unit_of)
    layers = {name: units(tracker.sources[name][dim]) for name, dim in sorted(tracker.filters.items())}
    order = [name for name in tracker.sources if name in layers]
    mixing = [units(ids) for ids in tracker.ties.statistics]
    statistics = np.unique(np.concatenate([*mixing, np.empty(0, np.int64)]))
    return ChannelGraph(
        num_units=num_units,
        bindings=bindings,
        layers={name: layers[name] for name in order},
        filter_dims={name: tracker.filters[name] for name in order},
        pinned=pinned,
        terms={"macs": _macs(tracker, units), "params": _params(tracker, bindings)},
        unsupported=tracker.unsupported,
        statistics_units=statistics[statistics >= 0],
        notes=notes,
        types={name: type(module) for name, module in tracker.model.named_modules()},
        optional=_optional(tracker.model, layers),
        evidence=Evidence(inputs, kwargs, tracker, modes, components, unit_of, mask),
    )


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


def _bindings(tracker: Tracker, units: Any) -> dict[str, dict[int, Units]]:
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


def _macs(tracker: Tracker, units: Any) -> list[Term]:
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
