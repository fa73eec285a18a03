"""Entry point of tracing: ``trace(model, *inputs)`` returns the channel graph of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_prune.graph.builder import build_graph
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.pins import pinned_tensors
from lightning_prune.tracing.calls import Recording
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.isolation import gc_paused
from lightning_prune.tracing.module_state import ModuleState
from lightning_prune.tracing.recorder import raised_in, record_forward
from lightning_prune.tracing.rules.dynamic_sizes import (
    pin_converted_size,
    pin_mismatched_sizes,
    require_equality,
)
from lightning_prune.tracing.rules.registry import apply_rule
from lightning_prune.tracing.traceable import refusal_reason, unprunable_tensors, unwrapped
from lightning_prune.tracing.traced_int import Attribute, evaluate, form_of, leaves
from lightning_prune.tracing.tracker import SizeUse, Tracker
from lightning_prune.tracing.unreached import pin_unreached
from lightning_prune.utils.devices import on_cpu
from lightning_prune.utils.example_inputs import Example, as_example
from lightning_prune.utils.module_walk import walked_once
from lightning_prune.utils.passing import is_passing

__all__ = ["TraceError", "analyse", "trace"]

MODES = (False, True)  # values of `training`; eval first, since MACs are counted in the first mode


class TraceError(RuntimeError):
    """Raised if a network cannot be traced. The network is unchanged.

    Example:
        >>> import torch
        >>> try:
        ...     graph = trace(nn.Linear(2, 1), torch.zeros(1, 3))
        ... except TraceError as error:
        ...     print(str(error)[:40])
        the network raises on its example input:
    """


@on_cpu()
def trace(model: nn.Module, *inputs: Any, others: Sequence[Any] = (), **kwargs: Any) -> ChannelGraph:
    """Trace the forward of ``model`` on example inputs, and return which channels depend on which.

    The forward runs on fake tensors, which have shapes but no values: in eval mode and in train mode (auxiliary heads
    exist only there), or in eval mode alone if no code but that of known operators, such as batch norms and dropout,
    reads the mode. The model is not changed.

    Args:
        model: any eager network.
        *inputs: example inputs of the forward. Their values do not matter; their shapes do, since MACs are those of
            one forward on these inputs.
        others: further examples, each a tensor, a tuple or a dictionary of named inputs, for networks that take other
            branches on other values: layers that no example reaches could read any channels of their size, which
            are pinned where the code branches on values.
        **kwargs: example keyword inputs.

    Raises:
        TraceError: the forward raises in both modes (the message includes the error of the model), or in one for lack
            of memory and the like; or the model is quantised, wrapped for distributed training, lazy or scripted (the
            message says what to do instead).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> len(graph.prunable), graph.cost("params"), graph.cost("params", remove=[0, 1])
        (8, 242, 182)
        >>> graph.pinned[graph.layers["2.weight"][0]]
        "is the network's output"
    """
    if (reason := refusal_reason(model)) is not None:
        raise TraceError(reason)
    with gc_paused(), walked_once(model):
        tracker = Tracker(model)
        tracker.state = ModuleState.of(model)
        examples = ((inputs, kwargs), *map(as_example, others))
        modes, notes = analyse(tracker, examples, MODES)
        notes += pin_unreached(tracker)
        _tie_by_attributes(tracker)
        _tie_by_expressions(tracker)
        pin_mismatched_sizes(tracker)
        for tensor, reason in [*pinned_tensors(model), *unprunable_tensors(model)]:
            tracker.pin_all([tensor], reason)
        return build_graph(tracker, modes, notes, examples)


def analyse(
    tracker: Tracker, examples: Sequence[Example], modes: Iterable[bool]
) -> tuple[tuple[bool, ...], list[str]]:
    """Record the forward in each mode and apply the rules to its operators. MACs come from the first mode that runs.

    Args:
        tracker: of the model; receives ties, pins and costs.
        examples: inputs of the forward; those after the first are followed in the modes in which the first runs.
        modes: values of ``training`` to try.

    Returns:
        The modes that ran, and notes for the user.

    Raises:
        TraceError: the forward raises in all modes, in one for a reason that may pass, or on one of the other
            examples.
    """
    finished: list[bool] = []
    notes: list[str] = []
    errors: dict[str, Exception] = {}
    with unwrapped(tracker.model):
        for training in modes:
            mode = "train" if training else "eval"
            try:
                recording = record_forward(tracker.model, *examples[0], training)
            except Exception as raised:
                if is_passing(raised):  # says nothing about this mode, which must be part of the trace
                    raise TraceError(
                        f"the trace failed in {mode} mode: {_describe_error(raised)}"
                    ) from raised
                errors[mode] = raised
                notes.append(f"{mode} mode cannot be run: {raised}")
                continue
            recordings = [recording, *_record_others(tracker, examples[1:], training)]
            for number, each in enumerate(recordings):
                _apply_rules(each, tracker, count_macs=not finished and not number)
            finished.append(training)
            notes += dict.fromkeys(each.reason for each in recordings if each.real)
            if not training:
                tracker.modes_alike = all(each.modes_alike for each in recordings)
            if tracker.modes_alike and tracker.dense is None:
                break
        if not finished:
            raise TraceError(f"the network raises on its example input: {_describe(errors)}") from next(
                iter(errors.values())
            )
    return tuple(finished), notes


def _record_others(tracker: Tracker, others: Sequence[Example], training: bool) -> Iterator[Recording]:
    for number, (inputs, kwargs) in enumerate(others, start=1):
        try:
            yield record_forward(tracker.model, inputs, kwargs, training)
        except Exception as error:
            raise TraceError(
                f"the network raises on example {number} of others: {_describe_error(error)}"
            ) from error


def _describe(errors: Mapping[str, Exception]) -> str:
    """Return the error of each mode, once if it is the same in all."""
    texts = {mode: _describe_error(error) for mode, error in errors.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"in {mode} mode {text}" for mode, text in texts.items())


def _describe_error(error: Exception) -> str:
    where = raised_in(error)
    return f"{type(error).__name__}: {error}{f' (in {where!r})' if where else ''}"


def _apply_rules(recording: Recording, tracker: Tracker, count_macs: bool) -> None:
    costs = list(tracker.costs)
    # What numpy computes of values cannot be told from constants.
    tracker.met_values = bool(recording.numpy_tensors)
    for call in recording.calls:
        apply_rule(call, tracker)
    tracker.pin_all(recording.numpy_tensors, "leaves torch for numpy, where it cannot be followed")
    tracker.pin_all(recording.outputs, "is the network's output")
    tracker.branches_on_values |= recording.real
    tracker.entered |= recording.entered
    tracker.reads.append(recording.reads)
    tracker.returned += [*recording.outputs, *recording.numpy_tensors]
    # Sizes that depend on values are not those of the smaller network.
    tracker.outputs += [] if tracker.met_values else [tensor.shape for tensor in recording.outputs]
    for pair in recording.size_events.equal:
        require_equality(pair, tracker)
    for size in recording.size_events.as_floats:
        tracker.mark_as_float(size)
    for size in recording.size_events.as_ints:
        pin_converted_size(size, tracker)
    if count_macs:
        tracker.num_costed = len(tracker.operators)
    else:  # the MACs of this mode were counted in the first one
        tracker.costs = costs


def _tie_by_attributes(tracker: Tracker) -> None:
    """Tie dimensions whose sizes come from the same attribute, since it can have only one value after a cut.

    Where one size is a multiple of the other, each channel of the smaller dimension is tied to that many of the
    larger one.
    """
    smallest: dict[Any, Ids] = {}  # key of an attribute -> ids of the smallest dimension that it determines
    for use in sorted(tracker.size_uses, key=lambda use: len(use.ids)):
        origins = list(leaves(use.size))
        if len(origins) == 1 and isinstance(origins[0], Attribute) and len(use.ids):
            ids = smallest.setdefault(origins[0].key, use.ids)
            times, rest = divmod(len(use.ids), len(ids))
            if not rest and _is_proportional(use, origins[0], len(ids)):
                tracker.ties.tie(ids, tracker.tie_across(use.ids.view(times, -1)), use.where)


def _tie_by_expressions(tracker: Tracker) -> None:
    """Tie dimensions of equal size that is computed from several attributes in the same way: ``width // heads``."""
    firsts: dict[Any, Ids] = {}
    for use in tracker.size_uses:
        origins = list(leaves(use.size))
        if len(origins) > 1 and all(isinstance(origin, Attribute) for origin in origins) and not use.others:
            ids = firsts.setdefault((form_of(use.size), len(use.ids)), use.ids)
            tracker.ties.tie(ids, use.ids, use.where)


def _is_proportional(use: SizeUse, attribute: Attribute, num_ids: int) -> bool:
    """Return whether lowering the attribute by 1 lowers the size by its share of ``num_ids`` ids.

    Args:
        use: a size computed from the attribute.
        attribute: the attribute.
        num_ids: the number of ids in the smallest dimension that the attribute determines.
    """
    ids_per_step = num_ids // max(attribute.value, 1)
    times = len(use.ids) // num_ids
    return evaluate(use.size, {attribute.key: attribute.value - 1}) == len(use.ids) - ids_per_step * times
