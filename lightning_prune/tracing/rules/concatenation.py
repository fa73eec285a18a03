"""Rules of operators that join tensors, pad them, or write one tensor into another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


@rule(aten.copy_)
def copy_(call: OperatorCall, tracker: Tracker) -> None:
    """Tie the written tensor to the tensor (or view of it) that is overwritten."""
    target, source = call.args[0], call.args[1]
    lead = target.dim() - source.dim()
    for dim in range(source.dim()):
        tracker.tie_operand(tracker.along(target, lead + dim), source, dim)
    tracker.label(call.out, tracker.labels(target))


@rule(aten.pad_sequence)
def pad_sequence(call: OperatorCall, tracker: Tracker) -> None:
    """Tie sequences of shape (length, *) along all dimensions after the first; batch and length have no ids."""
    sequences = call.args[0]
    for sequence in sequences:
        tracker.pin(tracker.along(sequence, 0), "is padded along its channels")
    rank = sequences[0].dim()
    tracker.label(call.out, [(), (), *(_tie_along(sequences, dim, tracker) for dim in range(1, rank))])


@rule(aten.cat, aten.concat)
def cat(call: OperatorCall, tracker: Tracker) -> None:
    """Concatenate ids along the dimension of concatenation; tie them along all others."""
    # torch ignores tensors of shape (0,) in a concatenation
    tensors = [tensor for tensor in call.args[0] if not (tensor.dim() == 1 and tensor.shape[0] == 0)]
    cat_dim = (call.arg("dim") or 0) % call.out.dim()
    joins = [_concatenate if dim == cat_dim else _tie_along for dim in range(call.out.dim())]
    tracker.label(call.out, [join(tensors, dim, tracker) for dim, join in enumerate(joins)])


@rule(aten.stack)
def stack(call: OperatorCall, tracker: Tracker) -> None:
    """Tie ids along all dimensions; the new dimension has none."""
    rank = call.out.dim()
    labels = [_tie_along(call.args[0], dim, tracker) for dim in range(rank - 1)]
    labels.insert((call.arg("dim") or 0) % rank, ())
    tracker.label(call.out, labels)


def _concatenate(tensors: Sequence[Tensor], dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    arrays = [tracker.along(tensor, dim) for tensor in tensors]
    if all(ids is None for ids in arrays):
        return ()
    parts = zip(arrays, tensors, strict=True)
    return (torch.cat([_fixed_ids(t.shape[dim], tracker) if ids is None else ids for ids, t in parts]),)


def _tie_along(tensors: Sequence[Tensor], dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    arrays = [tracker.along(tensor, dim) for tensor in tensors]
    first = next((ids for ids in arrays if ids is not None), None)
    for ids in arrays if first is not None else ():
        tracker.tie(first, ids)
    return () if first is None else (first,)


def _fixed_ids(length: int, tracker: Tracker) -> Ids:
    """Return new, pinned ids for channels that come from no parameter."""
    ids = tracker.ties.fresh(length)
    tracker.pin(ids, "belongs to a tensor of fixed size")
    return ids


@rule(aten.constant_pad_nd)
def pad(call: OperatorCall, tracker: Tracker) -> None:
    """Add pinned ids where channels are padded."""
    source, amounts = call.args[0], list(call.args[1])
    labels = list(tracker.labels(source))
    for back, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        ids = tracker.along(source, -back)
        if ids is not None and (before or after):
            labels[-back] = (_padded_ids(ids, before, after, tracker),)
    tracker.label(call.out, labels)


@rule(aten.pad)
def pad_circular(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the ids along dimensions with circular padding; keep the others."""
    source, amounts = call.args[0], list(call.args[1])
    labels = list(tracker.labels(source))
    for back, both in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if any(both):
            tracker.pin(tracker.along(source, -back), "is padded along its channels")
            labels[-back] = ()
    tracker.label(call.out, labels)


def _padded_ids(ids: Ids, before: int, after: int, tracker: Tracker) -> Ids:
    if min(before, after) < 0:
        tracker.pin(ids, "is cropped by a padding of negative size")
    kept = ids[max(-before, 0) : len(ids) - max(-after, 0)]
    return torch.cat([_fixed_ids(max(before, 0), tracker), kept, _fixed_ids(max(after, 0), tracker)])
