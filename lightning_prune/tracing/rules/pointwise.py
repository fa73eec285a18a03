"""Operators that treat each element by itself, and reductions over dimensions (level 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.traced_int import TracedInt
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


# All that torch tags as pointwise comes here too; these are, but lack the tag.
@rule(
    aten.add.Tensor, aten.hardswish, aten.hardswish_, aten.gelu_, aten.mish_, aten.threshold_, aten.abs_,
    aten.log_sigmoid, aten.log_sigmoid_forward, aten.masked_fill.Tensor, aten.masked_fill_, aten.rsub.Tensor,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.floor_divide, aten.type_as, aten.rrelu_with_noise,
)  # fmt: skip
def pointwise(call: OperatorCall, tracker: Tracker) -> None:
    """Tie the operands, position by position, with broadcasting."""
    operands = [tensor for tensor in call.tensors if tensor.dim()]
    alone = call.python is not None and call.op._opname.strip("_") in call.python.name
    for value in call.python.args if alone and call.python is not None else ():
        if isinstance(value, TracedInt):
            tracker.enters(value)
    for out in call.outputs:
        tracker.label(out, [_together(operands, dim - out.dim(), tracker) for dim in range(out.dim())])
    if call.op._schema.is_mutable and operands and call.outputs:
        tracker.label(call.args[0], tracker.labels(call.outputs[0]))


def _together(operands: list[Tensor], dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    """Ids along one dimension of the result, counted from the back."""
    wide = [operands[index] for index in _wide(operands, dim, tracker)]
    if len(wide) < 2:
        return tracker.labels(wide[0])[dim] if wide else ()
    if any(len(tracker.labels(tensor)[dim]) > 1 for tensor in wide):
        return _tie_merged([tracker.labels(tensor)[dim] for tensor in wide], tracker)
    arrays = [tracker.labels(tensor)[dim] for tensor in wide]
    return _tie_all([ids[0] if ids else None for ids in arrays], wide[0].shape[dim], tracker)


def _wide(operands: list[Tensor], dim: int, tracker: Tracker) -> tuple[int, ...]:
    """Which operands are not broadcast: in the dense network, since channels may shrink to one, like a gate."""
    sizes = [tensor.shape[dim] if tensor.dim() >= -dim else 0 for tensor in operands]
    before = tracker.before("wide")
    wide = tuple(i for i, size in enumerate(sizes) if size == max(sizes)) if before is None else before
    tracker.decided("wide", wide)
    return tuple(index for index in wide if index < len(sizes) and sizes[index])


def _tie_all(arrays: list[Ids | None], size: int, tracker: Tracker) -> tuple[Ids, ...]:
    known = [ids for ids in arrays if ids is not None]
    if len(known) > 1:  # a weight under a mask is the weight's, not the mask's
        known.sort(
            key=lambda ids: (source := tracker.owner(ids)) is not None and source.name in tracker.buffers
        )
    for ids in known[1:]:
        tracker.tie(known[0], ids)
    if known and len(known) < len(arrays) and size > 1:
        tracker.pin(known[0], "meets a tensor of fixed size")
    return tuple(known[:1])


def _tie_merged(arrays: list[tuple[Ids, ...]], tracker: Tracker) -> tuple[Ids, ...]:
    """Dimensions into which several prunable ones were merged meet: alike ones are tied, others pinned."""
    first = max(arrays, key=len)
    for other in arrays:
        if len(other) == len(first):
            for left, right in zip(first, other, strict=True):
                tracker.tie(left, right)
        else:
            for ids in (*first, *other):
                tracker.pin(ids, "two prunable dimensions were merged and meet a single one")
    return first


@rule(aten.sum, aten.any, aten.all, aten.count_nonzero)
def summation(call: OperatorCall, tracker: Tracker) -> None:
    """Reductions to which a channel of zeros adds nothing."""
    _reduce(call, tracker, mixes=False)


@rule(
    aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.prod, aten.var, aten.std,
    aten.var_mean, aten.std_mean, aten.logsumexp, aten.median, aten.nanmedian, aten.linalg_vector_norm, aten.norm,
)  # fmt: skip
def statistic(call: OperatorCall, tracker: Tracker) -> None:
    """Reductions whose value changes when a channel goes."""
    if len(call.outputs) == 1 and len(call.tensors) == 2:  # max(a, b): not a reduction
        pointwise(call, tracker)
    else:
        _reduce(call, tracker, mixes=True)


def _reduce(call: OperatorCall, tracker: Tracker, mixes: bool) -> None:
    source = call.args[0]
    dims = call.arg("dim")
    every = list(range(source.dim()))
    gone = every if dims is None or dims == [] else [d % source.dim() for d in _listed(dims)]
    labels = list(tracker.labels(source))
    for dim in gone:
        for ids in labels[dim]:
            if mixes:
                tracker.mixes(ids)
        labels[dim] = ()
    for out in call.outputs:
        kept = [ids for dim, ids in enumerate(labels) if dim not in gone]
        tracker.label(out, labels if out.dim() == source.dim() else kept)


def _listed(dims: int | list[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


@rule(aten._softmax, aten._log_softmax, aten.softmax, aten.log_softmax, aten._safe_softmax, aten.logcumsumexp)
def softmax(call: OperatorCall, tracker: Tracker) -> None:
    """Channels in the sum keep their place, but their values depend on each other."""
    source = call.args[0]
    tracker.mixes(tracker.along(source, call.args[1]))
    same_labels(call, tracker)


@rule(aten.glu)
def glu(call: OperatorCall, tracker: Tracker) -> None:
    """The first half times the sigmoid of the second: halves live or die together."""
    source = call.args[0]
    dim = (call.arg("dim", -1)) % source.dim()
    labels = list(tracker.labels(source))
    ids = tracker.along(source, dim)
    if ids is not None:
        labels[dim] = (tracker.tie_across(ids.view(2, -1)),)
    tracker.label(call.out, labels)


@rule(aten._prelu_kernel, aten.prelu)
def prelu(call: OperatorCall, tracker: Tracker) -> None:
    """A slope per channel (dimension 1), or one for all."""
    source, weight = call.args[:2]
    if weight.dim() == 1 and len(weight) > 1 and source.dim() > 1:
        tracker.tie(tracker.along(source, 1), tracker.along(weight, 0))
        same_labels(call, tracker)
    else:
        pointwise(call, tracker)
