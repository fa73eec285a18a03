"""Rules of operators that take parts of a dimension: split, chunk, unbind, select, slice.

The sizes of the parts must be right after a cut, too: the code may pass them as constants, attributes or sizes of
tensors.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import OPEN_END, passed_argument, passed_bounds
from lightning_prune.tracing.rules.decisions import as_in_dense
from lightning_prune.tracing.rules.passed_sizes import is_among, remaining_sizes, sizes_match
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.traced_int import PassedSize, TensorSize, TracedInt, leaves
from lightning_prune.tracing.tracker import Tracker

__all__ = ["tie_equal_parts"]

aten = torch.ops.aten


@rule(aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.chunk)
@rule(aten.unsafe_chunk, aten.tensor_split)
def split(call: OperatorCall, tracker: Tracker) -> None:
    """Split the ids along one dimension."""
    source, parts = call.args[0], call.outputs
    dim = (call.arg("dim") or 0) % source.dim()
    part_labels = _part_labels(call, tracker.along(source, dim), [part.shape[dim] for part in parts], tracker)
    for part, arrays in zip(parts, part_labels, strict=True):
        labels = list(tracker.labels(source))
        labels[dim] = arrays
        tracker.label(part, labels)


def _part_labels(
    call: OperatorCall, ids: Ids | None, lengths: list[int], tracker: Tracker
) -> list[tuple[Ids, ...]]:
    """Return the labels of each part; tie or pin ids such that the sizes of the parts are right after a cut."""
    if ids is None or len(lengths) == 1:
        return [(ids,) if ids is not None else ()] * len(lengths)
    parts = list(ids.split(lengths))
    passed = _passed_part_sizes(call)
    if len(passed) > 1 and all(map(partial(_is_followable, tracker), passed, parts)):
        for size, part in zip(passed, parts, strict=True):
            if _reads_tensor_size(size):
                tracker.tie(part, _ids_of_size(size, tracker))
            else:
                tracker.require_size(size, part)
    elif len(set(lengths)) > 1:
        tracker.pin(ids, "is split into unequal parts by sizes that do not follow it")
        for size in passed:
            tracker.register_size(size)
            for leaf in leaves(size) if size is not None else ():
                tracker.pin(tracker.sizes.get(leaf.key), "its number sizes a split of other channels")
    else:
        for size in passed:
            tie_equal_parts(ids.view(len(lengths), -1), size, tracker)
    return [(part,) for part in parts]


def _passed_part_sizes(call: OperatorCall) -> list[PassedSize]:
    """Return one size, or one per part; None where the code passes a number of parts, as in ``chunk``."""
    if call.python is None or "split" not in call.python.name or call.op is aten.tensor_split.sections:
        return [None]
    passed = passed_argument(call, 1, "split_size_or_sections")
    return list(passed) if isinstance(passed, (tuple, list)) else [passed]


def _reads_tensor_size(size: PassedSize) -> bool:
    return size is not None and any(isinstance(leaf, TensorSize) for leaf in leaves(size))


def _ids_of_size(size: PassedSize, tracker: Tracker) -> Ids | None:
    """Return the ids of the dimension that a size was read from; None if it was computed, or has no ids."""
    if not isinstance(size, TracedInt) or not isinstance(size.expression, TensorSize):
        return None
    tracker.register_size(size)
    return tracker.sizes[size.expression.key]


def _is_followable(tracker: Tracker, size: PassedSize, part: Ids) -> bool:
    """Return whether a part can shrink with its size: an attribute or constant, or the size of another tensor."""
    ids = _ids_of_size(size, tracker)
    return not _reads_tensor_size(size) or (ids is not None and len(ids) == len(part))


def tie_equal_parts(grid: Tensor, size: PassedSize, tracker: Tracker) -> None:
    """Tie parts of equal size to each other, and make sure that this size can shrink.

    Args:
        grid: the ids of all parts, shape (parts, size).
        size: the size of a part, as the code passed it.
        tracker: receives the ties, and the attribute to set or the pin.
    """
    first = tracker.tie_across(grid)
    if isinstance(size, TracedInt):
        values = remaining_sizes([size], is_among(grid[:, 0]), tracker)
        if not sizes_match([size], [grid.shape[1] - 1], values):
            tracker.require_size(size, first)
    elif size is not None and size >= 0:
        tracker.require_size(size, first)


@rule(aten.unbind)
def unbind(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimension of which each index becomes one result."""
    source = call.args[0]
    dim = (call.arg("dim") or 0) % source.dim()
    tracker.pin(tracker.along(source, dim), "is taken apart index by index")
    labels = [arrays for d, arrays in enumerate(tracker.labels(source)) if d != dim]
    for out in call.outputs:
        tracker.label(out, labels)


@rule(aten.select)
def select(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the selected index and all before it (from the end: all after it), so that its number stays right."""
    source, dim, index = call.args[0], call.args[1] % call.args[0].dim(), call.args[2]
    ids = tracker.along(source, dim)
    if ids is not None:
        tracker.pin(ids[: index + 1] if index >= 0 else ids[index:], "is picked by its number")
    tracker.label(call.out, [arrays for d, arrays in enumerate(tracker.labels(source)) if d != dim])


@rule(aten.slice)
def slice_(call: OperatorCall, tracker: Tracker) -> None:
    """Slice the ids along one dimension."""
    source = call.args[0]
    dim = (call.arg("dim") or 0) % source.dim()
    start, end = call.arg("start") or 0, call.arg("end")
    end, step = OPEN_END if end is None else end, call.arg("step") or 1
    labels = list(tracker.labels(source))
    ids = tracker.along(source, dim)
    if ids is not None:
        labels[dim] = (_slice_ids(call, ids, start, end, step, tracker),)
    tracker.label(call.out, labels)


def _slice_ids(call: OperatorCall, ids: Ids, start: int, end: int, step: int, tracker: Tracker) -> Ids:
    """Return the sliced ids; tie or pin ids such that the slice takes the same channels after a cut."""
    if step != 1:
        _tie_strided(ids, start, end, step, tracker)
    elif (start, end) != (0, OPEN_END):
        _follow_bounds(call, ids, start, end, tracker)
    return ids[start if start >= 0 else max(len(ids) + start, 0) : end : step]


def _follow_bounds(call: OperatorCall, ids: Ids, start: int, end: int, tracker: Tracker) -> None:
    bounds = passed_bounds(call, start, end)
    if start > 0 and not any(isinstance(bound, TracedInt) for bound in bounds):
        # An open end must not become empty: pin one channel after the start.
        tracker.pin(ids[: end if end < OPEN_END else start + 1], "is sliced at numbers in the code")
        return
    for bound, number in zip(bounds, (start, end), strict=True):
        if bound is not None and number not in (0, OPEN_END):
            _follow_bound(bound, ids, tracker)


def _tie_strided(ids: Ids, start: int, end: int, step: int, tracker: Tracker) -> None:
    """Tie each ``step`` neighbouring channels, of which a slice takes one; pin all if they do not divide evenly."""
    if len(ids) % step == 0 and 0 <= start < step and end >= len(ids):
        tracker.tie_across(ids.view(-1, step).t())
    else:
        tracker.pin(ids, "is sliced with a stride that does not divide it")


def _follow_bound(bound: PassedSize, ids: Ids, tracker: Tracker) -> None:
    """Make sure that a start or end of a slice is right after a cut.

    A constant pins the channels that it counts. A bound that divides the dimension into equal parts ties these parts.
    Any other bound must be an attribute, which is set to the number of channels before it.
    """
    number = int(bound or 0)
    if not isinstance(bound, TracedInt):
        if number < len(ids):
            tracker.pin(ids[:number] if number > 0 else ids[number:], "is sliced at a number in the code")
        return
    divides = 0 < number < len(ids) and len(ids) % number == 0
    num_parts = as_in_dense("parts", len(ids) // number if divides else 0, tracker)
    if not num_parts or len(ids) % num_parts:
        _require_bound(bound, ids[:number], ids, tracker)
        return
    parts = ids.view(num_parts, -1)
    tracker.tie_across(parts)
    values = remaining_sizes([bound], is_among(parts[:, 0]), tracker)
    if not sizes_match([bound], [parts.shape[1] - 1], values):
        _require_bound(bound, parts[0], ids, tracker)


def _require_bound(bound: TracedInt, before: Ids, ids: Ids, tracker: Tracker) -> None:
    """Require that a bound equals the number of channels before it; pin all channels if it cannot be set."""
    if _reads_tensor_size(bound) or bound <= 0:
        tracker.pin(ids, "is sliced at a number that does not follow it")
        return
    tracker.require_size(bound, before)
    if as_in_dense("last", len(ids) == len(before) + 1, tracker):
        tracker.pin(ids[-1:], "is the only channel that a slice leaves")
