"""Operators that put tensors side by side, or into each other (level 1)."""

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
    """Writing into a tensor (or a view of it) ties what is written to what it overwrites."""
    target, source = call.args[0], call.args[1]
    lead = target.dim() - source.dim()
    for dim in range(source.dim()):
        if source.shape[dim] > 1:
            tracker.tie(tracker.along(target, lead + dim), tracker.along(source, dim))
    tracker.label(call.out, tracker.labels(target))


@rule(aten.cat, aten.concat)
def cat(call: OperatorCall, tracker: Tracker) -> None:
    """Ids one after the other along the dimension; tied along all others."""
    tensors = [tensor for tensor in call.args[0] if not (tensor.dim() == 1 and tensor.shape[0] == 0)]
    at = (call.arg("dim") or 0) % call.out.dim()
    joins = [_concatenated if dim == at else _tied for dim in range(call.out.dim())]
    tracker.label(call.out, [join(tensors, dim, tracker) for dim, join in enumerate(joins)])


@rule(aten.stack)
def stack(call: OperatorCall, tracker: Tracker) -> None:
    """Tied along all dimensions but the new one."""
    rank = call.out.dim()
    labels = [_tied(call.args[0], dim, tracker) for dim in range(rank - 1)]
    labels.insert((call.arg("dim") or 0) % rank, ())
    tracker.label(call.out, labels)


def _concatenated(tensors: Sequence[Tensor], dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    arrays = [tracker.along(tensor, dim) for tensor in tensors]
    if all(ids is None for ids in arrays):
        return ()
    parts = zip(arrays, tensors, strict=True)
    return (torch.cat([_fixed(t.shape[dim], tracker) if ids is None else ids for ids, t in parts]),)


def _tied(tensors: Sequence[Tensor], dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    arrays = [tracker.along(tensor, dim) for tensor in tensors]
    first = next((ids for ids in arrays if ids is not None), None)
    for ids in arrays if first is not None else ():
        tracker.tie(first, ids)
    return () if first is None else (first,)


def _fixed(length: int, tracker: Tracker) -> Ids:
    """Ids for channels that no parameter owns: they always stay."""
    ids = tracker.ties.fresh(length)
    tracker.pin(ids, "belongs to a tensor of fixed size")
    return ids


@rule(aten.constant_pad_nd)
def pad(call: OperatorCall, tracker: Tracker) -> None:
    """Padding along channels adds channels of fixed number."""
    source, amounts = call.args[0], list(call.args[1])
    labels = list(tracker.labels(source))
    for back, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        ids = tracker.along(source, -back)
        if ids is not None and (before or after):
            labels[-back] = (_padded(ids, before, after, tracker),)
    tracker.label(call.out, labels)


@rule(aten.pad)
def pad_circular(call: OperatorCall, tracker: Tracker) -> None:
    """Padding with what is at the other end leaves the dimensions alone that are not padded."""
    source, amounts = call.args[0], list(call.args[1])
    labels = list(tracker.labels(source))
    for back, both in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if any(both):
            tracker.pin(tracker.along(source, -back), "is padded along its channels")
            labels[-back] = ()
    tracker.label(call.out, labels)


def _padded(ids: Ids, before: int, after: int, tracker: Tracker) -> Ids:
    if min(before, after) < 0:
        tracker.pin(ids, "is cropped by a padding of negative size")
    kept = ids[max(-before, 0) : len(ids) - max(-after, 0)]
    return torch.cat([_fixed(max(before, 0), tracker), kept, _fixed(max(after, 0), tracker)])
