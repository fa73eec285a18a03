"""The commonest operators, checked by what they do to survivors instead of by numbers (level 3).

For a convolution, a matrix product, a norm over the batch or a pointwise operator it is plain which operands must
have lost the same channels: comparing masks is exact, and a hundred times quicker than
:mod:`~lightning_prune.surgery.numerical_check`'s arithmetic. This knows nothing of the rules either. Wherever a case is not plainly
one of these, or the masks disagree, the answer is ``False`` and the numbers decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch._ops import OpOverload

from lightning_prune.surgery.masks import Mask, Masks, alike, flat, runs, same, surviving_shape, whole
from lightning_prune.tracing.calls import OperatorCall, tensors_among
from lightning_prune.tracing.tracker import TracedOperator

__all__ = ["fits"]

Known = Callable[[TracedOperator, TracedOperator, Masks, Masks], bool]

aten = torch.ops.aten
KNOWN: dict[OpOverload, tuple[Known, tuple[int, ...]]] = {}


def fits(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Whether the smaller call plainly gives the dense one's result, restricted to what survives.

    Args:
        dense: the call in the dense network. Its parameters have been cut since: their shapes are those in it.
        small: the call in the smaller network; the shapes of its operands are those that survive.
        operands: what survives of each tensor that the dense call reads.
        results: what survives of each tensor that it gives, by the labels.
    """
    pointwise = torch.Tag.pointwise in dense.call.op.tags
    known, besides = KNOWN.get(dense.call.op, (_pointwise if pointwise else None, ()))
    if known is None or _settings(dense.call, besides) != _settings(small.call, besides):
        return False
    if not known(dense, small, operands, results):
        return False
    outputs = zip(dense.call.outputs, small.call.outputs, results, strict=True)
    # Where nobody has said what a result is, its reader's operands will not fit.
    return all(
        list(now.shape) == surviving_shape(was, masks) or (at > 0 and whole(masks))
        for at, (was, now, masks) in enumerate(outputs)
    )


def _knows(*operators: OpOverload, besides: tuple[int, ...] = ()) -> Callable[[Known], Known]:
    """Register what is said of ``operators``, whose arguments at the positions ``besides`` may follow the cut."""

    def register(function: Known) -> Known:
        KNOWN.update(dict.fromkeys(operators, (function, besides)))
        return function

    return register


def _settings(call: OperatorCall, besides: Sequence[int]) -> dict[int | str, Any]:
    """Arguments that are no tensors; those at the positions ``besides`` are left out."""
    given: dict[int | str, Any] = dict(enumerate(call.args))
    given.update(call.kwargs)
    return {at: value for at, value in given.items() if at not in besides and not tensors_among([value])}


def _pointwise(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Every operand and the result lost the same along each dimension, unless one element is repeated there."""
    if len(results) != 1:
        return False
    shape, out = dense.call.outputs[0].shape, results[0]
    return all(
        same(mask, out[-back]) if read[-back] == shape[-back] else mask is None and read[-back] == 1
        for read, masks in zip(dense.shapes, operands, strict=True)
        for back, mask in enumerate(reversed(masks), start=1)
    ) and max(map(len, dense.shapes)) == len(shape)


_ALSO_POINTWISE = (
    aten.clone.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
    aten.hardtanh_.default,
    aten.leaky_relu_.default,
    aten.relu_.default,
    aten.silu_.default,
)
KNOWN.update(dict.fromkeys(_ALSO_POINTWISE, (_pointwise, ())))


@_knows(aten.convolution.default, besides=(8,))
def _convolution(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, weight, *bias = operands
    out = results[0]
    if len(source) != len(weight) or not whole([source[0], *source[2:], *weight[2:], out[0], *out[2:]]):
        return False
    reads, writes = (weight[0], weight[1]) if dense.call.args[6] else (weight[1], weight[0])
    if not same(out[1], writes, *(mask[0] for mask in bias)):
        return False
    if dense.call.args[8] == small.call.args[8] == 1:
        return same(source[1], reads)
    return not dense.call.args[6] and _grouped(dense, small, source[1], weight)


def _grouped(dense: TracedOperator, small: TracedOperator, source: Mask, weight: Sequence[Mask]) -> bool:
    """Whole groups went, or the same channels of each; every group that stays has as many filters as the others."""
    (_, channels, *_), (filters, width, *_) = dense.shapes[:2]
    groups = int(dense.call.args[8])
    read = flat([channels], [source]).reshape(groups, -1)
    written = flat([filters], [weight[0]]).reshape(groups, -1)
    stay = read.any(axis=1)
    return (
        np.array_equal(stay, written.any(axis=1))
        and int(stay.sum()) == small.call.args[8]
        and bool((read[stay] == flat([width], [weight[1]])).all())
        and len(set(written[stay].sum(axis=1).tolist())) == 1
    )


@_knows(aten.native_batch_norm.default)
def _batch_norm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, *parameters = operands
    out = results[0]
    return whole([source[0], *source[2:], out[0], *out[2:]]) and same(
        source[1], out[1], *(each[0] for each in parameters)
    )


@_knows(aten.mm.default, aten.bmm.default)
def _product(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    left, right = operands
    out = results[0]
    return (
        same(left[-1], right[-2])
        and same(left[-2], out[-2])
        and same(right[-1], out[-1])
        and (same(*(each[0] for each in (left, right, out))) or len(out) == 2)
    )


@_knows(aten.addmm.default)
def _addmm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    bias, *factors = operands
    return len(bias) == 1 and same(bias[0], results[0][1]) and _product(dense, small, factors, results)


@_knows(aten.t.default, aten.transpose.int, aten.permute.default)
def _permuted(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source = operands[0]
    if dense.call.op is aten.permute.default:
        places = [int(dim) % len(source) for dim in dense.call.args[1]]
    else:
        places = list(range(len(source)))
        one, other = (int(dim) % max(len(source), 1) for dim in (dense.call.args[1:3] or (0, -1)))
        if len(source) > 1:
            places[one], places[other] = places[other], places[one]
    return all(same(source[place], mask) for place, mask in zip(places, results[0], strict=True))


@_knows(
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_nearest2d.default,
)
def _map_by_map(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source = operands[0]
    return (
        whole(source[-2:])
        and all(whole(out[-2:]) for out in results)
        and all(same(*each) for each in zip(source[:-2], *(out[:-2] for out in results), strict=True))
    )


@_knows(aten.mean.dim, aten.sum.dim_IntList)
def _reduced(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, count = operands[0], len(operands[0])
    dims = {
        int(dim) % count
        for dim in (dense.call.args[1] if len(dense.call.args) > 1 and dense.call.args[1] else range(count))
    }
    keep = bool(dense.call.args[2]) if len(dense.call.args) > 2 else False
    left = [None if dim in dims else source[dim] for dim in range(count) if keep or dim not in dims]
    return whole([source[dim] for dim in dims]) and all(
        same(mask, out) for mask, out in zip(left, results[0], strict=True)
    )


@_knows(aten.view.default, aten._unsafe_view.default, aten.reshape.default, besides=(1,))
def _reshaped(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Elements keep their order: the same ones must survive, group by group of merged or split dimensions."""
    before, after = dense.shapes[0], dense.call.outputs[0].shape
    groups = runs(before, after)
    return groups is not None and all(
        alike(before[a], operands[0][a], after[b], results[0][b]) for a, b in groups
    )


@_knows(aten.expand.default, besides=(1,))
def _expanded(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, out = operands[0], results[0]
    new = len(out) - len(source)
    sizes = dense.shapes[0], dense.call.outputs[0].shape[new:]
    return whole(out[:new]) and all(
        same(mask, other) if size == wide else mask is None and other is None
        for mask, other, size, wide in zip(source, out[new:], *sizes, strict=True)
    )


@_knows(aten.unbind.int, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
def _taken(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Parts along a dimension that loses nothing."""
    source = list(operands[0])
    dim = int(dense.call.arg("dim")) % len(source)
    left = source[:dim] + source[dim + 1 :] if dense.call.op in (aten.unbind.int, aten.select.int) else source
    return source[dim] is None and all(same(*pair) for out in results for pair in zip(left, out, strict=True))


@_knows(aten.cat.default)
def _joined(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    out, count = results[0], len(results[0])
    dim = int(dense.call.arg("dim")) % count
    if any(len(masks) != count for masks in operands):
        return False
    pieces = [flat([read[dim]], [masks[dim]]) for read, masks in zip(dense.shapes, operands, strict=True)]
    joined = np.concatenate(pieces)
    return np.array_equal(joined, flat([len(joined)], [out[dim]])) and all(
        same(out[other], *(masks[other] for masks in operands)) for other in range(count) if other != dim
    )
