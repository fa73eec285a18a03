"""Rules of pointwise operators and of reductions over dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.decisions import as_in_dense
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


# Every operator that torch tags as pointwise gets this rule, too (see `registry`); these lack the tag, some of the
# last two lines in torch 2.11 only.
@rule(
    aten.add.Tensor, aten.hardswish, aten.hardswish_, aten.gelu_, aten.mish_, aten.threshold_, aten.abs_,
    aten.log_sigmoid, aten.log_sigmoid_forward, aten.masked_fill.Tensor, aten.masked_fill_, aten.rsub.Tensor,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.floor_divide, aten.type_as, aten.rrelu_with_noise,
    aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_, aten.celu, aten.celu_, aten.selu, aten.selu_,
    aten.hardsigmoid, aten.hardsigmoid_, aten.hardtanh, aten.hardtanh_, aten.relu6, aten.softplus,
)  # fmt: skip
def pointwise(call: OperatorCall, tracker: Tracker) -> None:
    """Tie the operands position by position, with broadcasting."""
    operands = [tensor for tensor in call.tensors if tensor.dim()]
    for out in call.outputs:
        if len(operands) == 1 and out.shape == operands[0].shape:
            tracker.label(out, tracker.labels(operands[0]))
            continue
        tracker.label(out, [_tie_operands(operands, dim - out.dim(), tracker) for dim in range(out.dim())])
    if call.op._schema.is_mutable and operands and call.outputs:  # in place: the first argument is the result
        tracker.label(call.args[0], tracker.labels(call.outputs[0]))


def _tie_operands(operands: list[Tensor], dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    """Tie the operands along one dimension of the result (negative); return the labels of that dimension."""
    full = [operands[index] for index in _full_operands(operands, dim, tracker)]
    if len(full) < 2:
        return tracker.labels(full[0])[dim] if full else ()
    if any(len(tracker.labels(tensor)[dim]) > 1 for tensor in full):
        return _tie_merged([tracker.labels(tensor)[dim] for tensor in full], tracker)
    arrays = [tracker.labels(tensor)[dim] for tensor in full]
    return _tie_arrays([ids[0] if ids else None for ids in arrays], full[0].shape[dim], tracker)


def _full_operands(operands: list[Tensor], dim: int, tracker: Tracker) -> tuple[int, ...]:
    """Return the positions of the operands that are not broadcast along ``dim``."""
    sizes = [tensor.shape[dim] if tensor.dim() >= -dim else 0 for tensor in operands]
    largest = tuple(index for index, size in enumerate(sizes) if size == max(sizes))
    full = as_in_dense("full operands", largest, tracker)
    return tuple(index for index in full if index < len(sizes) and sizes[index])


def _tie_arrays(arrays: list[Ids | None], size: int, tracker: Tracker) -> tuple[Ids, ...]:
    """Tie the id arrays of all operands; pin them if an operand of the same size has none."""
    labelled = [ids for ids in arrays if ids is not None]
    if len(labelled) > 1:  # of a weight times a mask in a buffer, the result has the weight's ids
        labelled.sort(key=lambda ids: _is_from_buffer(ids, tracker))
    for ids in labelled[1:]:
        tracker.tie(labelled[0], ids)
    if labelled and len(labelled) < len(arrays) and size > 1:
        tracker.pin(labelled[0], "meets a tensor of fixed size")
    return tuple(labelled[:1])


def _is_from_buffer(ids: Ids, tracker: Tracker) -> bool:
    origin = tracker.origin(ids)
    return origin is not None and origin.name in tracker.buffers


def _tie_merged(arrays: list[tuple[Ids, ...]], tracker: Tracker) -> tuple[Ids, ...]:
    """Tie dimensions into which several prunable ones were merged; pin them if they were not merged alike."""
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
    """Follow reductions whose result stays the same without a channel of zeros; sums of constants count channels."""
    _reduce(call, tracker, is_statistic=tracker.is_constant(call.args[0]))


@rule(
    aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.prod, aten.var, aten.std,
    aten.var_mean, aten.std_mean, aten.logsumexp, aten.median, aten.nanmedian, aten.linalg_vector_norm, aten.norm,
    aten.aminmax,
)  # fmt: skip
def statistic(call: OperatorCall, tracker: Tracker) -> None:
    """Follow reductions whose result changes when a channel of zeros is removed."""
    if len(call.outputs) == 1 and len(call.tensors) == 2:  # max(a, b) is pointwise
        pointwise(call, tracker)
    else:
        _reduce(call, tracker, is_statistic=True)


def _reduce(call: OperatorCall, tracker: Tracker, is_statistic: bool) -> None:
    """Drop the labels of the reduced dimensions; mark their ids if the reduction is a statistic."""
    source = call.args[0]
    reduced = _reduced_dims(call.arg("dim"), source.dim())
    labels = list(tracker.labels(source))
    for dim in reduced:
        for ids in labels[dim]:
            if is_statistic:
                tracker.mark_statistics(ids)
        labels[dim] = ()
    for out in call.outputs:
        remaining = [ids for dim, ids in enumerate(labels) if dim not in reduced]
        tracker.label(out, labels if out.dim() == source.dim() else remaining)


def _reduced_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Return the dimensions as numbers from 0; all of them for None or an empty list."""
    if isinstance(dims, int):
        return [dims % rank]
    return [dim % rank for dim in dims] if dims else list(range(rank))


@rule(aten._softmax, aten._log_softmax, aten.softmax, aten.log_softmax, aten._safe_softmax, aten.logcumsumexp)
def softmax(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the labels; mark the channels of the sum, since the value of each depends on all."""
    source = call.args[0]
    tracker.mark_statistics(tracker.along(source, call.args[1]))
    same_labels(call, tracker)


@rule(aten.glu)
def glu(call: OperatorCall, tracker: Tracker) -> None:
    """Tie the first half of the channels to the second, whose sigmoid multiplies it."""
    source = call.args[0]
    dim = (call.arg("dim", -1)) % source.dim()
    labels = list(tracker.labels(source))
    ids = tracker.along(source, dim)
    if ids is not None:
        labels[dim] = (tracker.tie_across(ids.view(2, -1)),)
    tracker.label(call.out, labels)


@rule(aten._prelu_kernel, aten.prelu)
def prelu(call: OperatorCall, tracker: Tracker) -> None:
    """Tie the slopes to the channels (dimension 1), unless there is a single slope."""
    source, weight = call.args[:2]
    if weight.dim() == 1 and len(weight) > 1 and source.dim() > 1:
        tracker.tie(tracker.along(source, 1), tracker.along(weight, 0))
        same_labels(call, tracker)
    else:
        pointwise(call, tracker)


@rule(aten.bucketize)
def bucketize(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the labels; pin the boundaries, with all of which every value is compared."""
    tracker.pin_all(call.tensors[1:], "holds boundaries of buckets")
    same_labels(call, tracker)
