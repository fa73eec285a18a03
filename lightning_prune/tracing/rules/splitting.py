"""Operators that take parts of a dimension: the parts' sizes must stay true after a cut (level 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import argument, bounds
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.rules.reshape import among, fits, shrunk
from lightning_prune.tracing.traced_int import Size, TensorSize, TracedInt, leaves
from lightning_prune.tracing.tracker import Tracker

__all__ = ["equal_parts"]

aten = torch.ops.aten


@rule(aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.chunk)
@rule(aten.unsafe_chunk, aten.tensor_split)
def split(call: OperatorCall, tracker: Tracker) -> None:
    """Parts of a dimension."""
    source, parts = call.args[0], call.outputs
    dim = (call.arg("dim") or 0) % source.dim()
    pieces = _pieces(call, tracker.along(source, dim), [part.shape[dim] for part in parts], tracker)
    for part, piece in zip(parts, pieces, strict=True):
        labels = list(tracker.labels(source))
        labels[dim] = piece
        tracker.label(part, labels)


def _pieces(
    call: OperatorCall, ids: Ids | None, lengths: list[int], tracker: Tracker
) -> list[tuple[Ids, ...]]:
    """The ids of each part, and what keeps the parts' sizes true after a cut."""
    if ids is None or len(lengths) == 1:
        return [(ids,) if ids is not None else ()] * len(lengths)
    pieces = list(ids.split(lengths))
    passed = argument(call, 1, "split_size_or_sections") if call.python is not None else None
    explicit = (
        call.python is not None and "split" in call.python.name and call.op is not aten.tensor_split.sections
    )
    listed = (
        list(passed) if explicit and isinstance(passed, (tuple, list)) else [passed if explicit else None]
    )
    from_shape = any(
        isinstance(leaf, TensorSize) for size in listed if size is not None for leaf in leaves(size)
    )
    if len(listed) > 1 and not from_shape:
        for size, piece in zip(listed, pieces, strict=True):
            tracker.use(size, piece)
    elif len(set(lengths)) > 1:
        tracker.pin(ids, "is split into unequal parts by sizes that do not follow it")
    else:
        for size in listed:
            equal_parts(ids.view(len(lengths), -1), size, tracker)
    return [(piece,) for piece in pieces]


def equal_parts(grid: Tensor, size: Size, tracker: Tracker) -> None:
    """Tie the parts to each other; their size must be free to follow."""
    first = tracker.tie_across(grid)
    if isinstance(size, TracedInt):
        gone = among(grid[:, 0])
        values = shrunk([size], gone, tracker)
        if not fits([size], [grid.shape[1] - 1], values):
            tracker.use(size, first)
    elif size is not None and size >= 0:
        tracker.use(size, first)


@rule(aten.unbind)
def unbind(call: OperatorCall, tracker: Tracker) -> None:
    """One result for each index of a dimension, which therefore cannot shrink."""
    source = call.args[0]
    dim = (call.arg("dim") or 0) % source.dim()
    tracker.pin(tracker.along(source, dim), "is taken apart index by index")
    rest = [ids for d, ids in enumerate(tracker.labels(source)) if d != dim]
    for out in call.outputs:
        tracker.label(out, rest)


@rule(aten.select)
def select(call: OperatorCall, tracker: Tracker) -> None:
    """One index of a dimension; it, and all before it, must stay where they are."""
    source, dim, index = call.args[0], call.args[1] % call.args[0].dim(), call.args[2]
    ids = tracker.along(source, dim)
    if ids is not None:
        tracker.pin(ids[: index + 1] if index >= 0 else ids[index:], "is picked by its number")
    tracker.label(call.out, [arrays for d, arrays in enumerate(tracker.labels(source)) if d != dim])


@rule(aten.slice)
def slice_(call: OperatorCall, tracker: Tracker) -> None:
    """A range of a dimension."""
    source = call.args[0]
    dim = (call.arg("dim") or 0) % source.dim()
    start, end = call.arg("start") or 0, call.arg("end")
    end, step = 2**63 - 1 if end is None else end, call.arg("step") or 1
    labels = list(tracker.labels(source))
    ids = tracker.along(source, dim)
    if ids is not None:
        labels[dim] = (_sliced(call, ids, start, end, step, tracker),)
    tracker.label(call.out, labels)


def _sliced(call: OperatorCall, ids: Ids, start: int, end: int, step: int, tracker: Tracker) -> Ids:
    if step != 1:
        _strided(ids, start, end, step, tracker)
    elif start > 0 and not any(isinstance(bound, TracedInt) for bound in bounds(call, start, end)):
        # Channels picked by number; an open end must not become empty.
        tracker.pin(ids[: end if end < 2**63 - 1 else start + 1], "is sliced at numbers in the code")
    elif (start, end) != (0, 2**63 - 1):
        for bound, number in zip(bounds(call, start, end), (start, end), strict=True):
            if bound is not None and number not in (0, 2**63 - 1):
                _bound(bound, ids, tracker)
    return ids[start if start >= 0 else max(len(ids) + start, 0) : end : step]


def _strided(ids: Ids, start: int, end: int, step: int, tracker: Tracker) -> None:
    """Every n-th channel: n neighbours live or die together."""
    if len(ids) % step == 0 and 0 <= start < step and end >= len(ids):
        tracker.tie_across(ids.view(-1, step).t())
    else:
        tracker.pin(ids, "is sliced with a stride that does not divide it")


def _bound(bound: Size, ids: Ids, tracker: Tracker) -> None:
    """Where a slice starts or ends: a constant pins what it counts, anything else must follow the cut."""
    number = int(bound or 0)
    if not isinstance(bound, TracedInt):
        if number < len(ids):
            tracker.pin(ids[:number] if number > 0 else ids[number:], "is sliced at a number in the code")
        return
    parts = tracker.before("parts")
    if parts is None:
        parts = len(ids) // number if 0 < number < len(ids) and len(ids) % number == 0 else 0
    tracker.decided("parts", parts)
    if not parts or len(ids) % parts:
        _follows(bound, ids[:number], ids, tracker)
        return
    grid = ids.view(parts, -1)
    tracker.tie_across(grid)
    if not fits([bound], [grid.shape[1] - 1], shrunk([bound], among(grid[:, 0]), tracker)):
        _follows(bound, grid[0], ids, tracker)


def _follows(bound: TracedInt, counted: Ids, ids: Ids, tracker: Tracker) -> None:
    if any(isinstance(leaf, TensorSize) for leaf in leaves(bound)) or bound <= 0:
        tracker.pin(ids, "is sliced at a number that does not follow it")
    else:
        tracker.use(bound, counted)
        last = tracker.before("last")
        last = len(ids) == len(counted) + 1 if last is None else last
        tracker.decided("last", last)
        if last:
            tracker.pin(ids[-1:], "is all that a slice leaves")
