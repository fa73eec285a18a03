"""``trace(model, *inputs) -> ChannelGraph``: follow a network's channels and name its units (level 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_prune.graph.builder import graph_of
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.pins import pinned_tensors
from lightning_prune.tracing.calls import Recording
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.isolation import uncollected
from lightning_prune.tracing.recorder import raised_in, record
from lightning_prune.tracing.rules.dynamic_sizes import pin_number, pin_what_sizes_do_not_follow
from lightning_prune.tracing.rules.registry import follow
from lightning_prune.tracing.traceable import kept_whole, refusal, unwrapped
from lightning_prune.tracing.traced_int import Attribute, evaluate, leaves
from lightning_prune.tracing.tracker import Tracker

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
        return graph_of(tracker, modes, notes, inputs, kwargs)


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
