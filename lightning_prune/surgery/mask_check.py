"""Check common operators by their kept-index masks, without arithmetic.

For a convolution, a matrix product, a batch norm or a pointwise operator it is known which dimensions of operands and
result must have lost the same indices. Comparing masks is exact, and about a hundred times faster than the arithmetic
of :mod:`~lightning_prune.surgery.numerical_check`. Like that module, this one does not use the rules of tracing. If
an operator or its arguments are not covered, or the masks differ, the answer is ``False``, and numbers decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch._ops import OpOverload

from lightning_prune.surgery.masks import (
    Mask,
    Masks,
    all_kept,
    element_mask,
    matching_dims,
    same_elements,
    same_masks,
    surviving_shape,
)
from lightning_prune.tracing.calls import OperatorCall, operator_tensors
from lightning_prune.tracing.tracker import TracedOperator

__all__ = ["CHECKS", "UNTAGGED_POINTWISE", "masks_agree", "pointwise_check"]

MaskCheck = Callable[[TracedOperator, TracedOperator, Masks, Masks], bool]

aten = torch.ops.aten
#: Operator -> its check, and the positions of the arguments that may change with the cut.
CHECKS: dict[OpOverload, tuple[MaskCheck, tuple[int, ...]]] = {}


def masks_agree(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Whether the masks alone prove that the smaller call gives the surviving part of the dense result.

    Args:
        dense: the call in the dense network. Its parameters have been cut since; ``dense.shapes`` are the old shapes.
        small: the call in the smaller network, with operands of the surviving shapes.
        operands: masks of the tensors that the dense call reads.
        results: masks of its results, according to the labels.
    """
    check, variable = CHECKS.get(dense.call.op, (pointwise_check(dense.call.op), ()))
    if check is None or _constant_arguments(dense.call, variable) != _constant_arguments(
        small.call, variable
    ):
        return False
    if not check(dense, small, operands, results):
        return False
    outputs = zip(dense.call.outputs, small.call.outputs, results, strict=True)
    # Further results may have no labels, hence no masks: where one is read, the check of its reader fails.
    return all(
        list(small_output.shape) == surviving_shape(output.shape, masks) or (i > 0 and all_kept(masks))
        for i, (output, small_output, masks) in enumerate(outputs)
    )


def pointwise_check(op: OpOverload) -> MaskCheck | None:
    """Return the check of operators that torch tags as pointwise; None for others."""
    return _pointwise if torch.Tag.pointwise in op.tags else None


def _checks(*operators: OpOverload, variable: tuple[int, ...] = ()) -> Callable[[MaskCheck], MaskCheck]:
    """Register a function as the check of ``operators``, whose arguments at ``variable`` may change with the cut."""

    def register(function: MaskCheck) -> MaskCheck:
        CHECKS.update(dict.fromkeys(operators, (function, variable)))
        return function

    return register


def _constant_arguments(call: OperatorCall, variable: Sequence[int]) -> dict[int | str, Any]:
    """Arguments that are not tensors, without those at the positions ``variable``."""
    arguments: dict[int | str, Any] = dict(enumerate(call.args))
    arguments.update(call.kwargs)
    return {at: x for at, x in arguments.items() if at not in variable and not operator_tensors([x])}


def _pointwise(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Each operand has lost the same as the result along each dimension, unless it is broadcast there."""
    if len(results) != 1:
        return False
    shape, out = dense.call.outputs[0].shape, results[0]
    return all(
        same_masks(mask, out[-back]) if read[-back] == shape[-back] else mask is None and read[-back] == 1
        for read, masks in zip(dense.shapes, operands, strict=True)
        for back, mask in enumerate(reversed(masks), start=1)
    ) and max(map(len, dense.shapes)) == len(shape)


UNTAGGED_POINTWISE = (
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.feature_dropout.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
    aten.hardtanh_.default,
    aten.leaky_relu_.default,
    aten.relu_.default,
    aten.silu_.default,
)
CHECKS.update(dict.fromkeys(UNTAGGED_POINTWISE, (_pointwise, ())))


@_checks(aten.convolution.default, variable=(8,))
def _convolution(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, weight, *bias = operands
    out = results[0]
    if len(source) != len(weight) or not all_kept([source[0], *source[2:], *weight[2:], out[0], *out[2:]]):
        return False
    reads, writes = (weight[0], weight[1]) if dense.call.args[6] else (weight[1], weight[0])
    if not same_masks(out[1], writes, *(mask[0] for mask in bias)):
        return False
    if dense.call.args[8] == small.call.args[8] == 1:
        return same_masks(source[1], reads)
    return not dense.call.args[6] and _grouped(dense, small, source[1], weight)


def _grouped(dense: TracedOperator, small: TracedOperator, source: Mask, weight: Sequence[Mask]) -> bool:
    """Whole groups were removed, or the same channels of each; all remaining groups have equally many filters."""
    (_, channels, *_), (filters, width, *_) = dense.shapes[:2]
    groups = int(dense.call.args[8])
    read = element_mask([channels], [source]).reshape(groups, -1)
    written = element_mask([filters], [weight[0]]).reshape(groups, -1)
    kept = read.any(axis=1)
    return (
        np.array_equal(kept, written.any(axis=1))
        and int(kept.sum()) == small.call.args[8]
        and bool((read[kept] == element_mask([width], [weight[1]])).all())
        and len(set(written[kept].sum(axis=1).tolist())) == 1
    )


@_checks(aten.native_batch_norm.default)
def _batch_norm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, *parameters = operands
    out = results[0]
    return all_kept([source[0], *source[2:], out[0], *out[2:]]) and same_masks(
        source[1], out[1], *(masks[0] for masks in parameters)
    )


@_checks(aten.native_layer_norm.default, variable=(1,))
def _layer_norm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """The normalised dimensions have lost what scale and shift have, and are passed as they are; no other is cut.

    The statistics change with the cut, as they must.
    """
    source, *parameters = operands
    count = len(dense.call.args[1])
    start = len(source) - count
    return (
        start >= 0
        and list(small.call.args[1]) == surviving_shape(dense.shapes[0], source)[start:]
        and all_kept([*source[:start], *(mask for out in results[1:] for mask in out)])
        and all(len(masks) == count for masks in parameters)
        and all(same_masks(*masks) for masks in zip(source, results[0], strict=True))
        and all(same_masks(*masks) for masks in zip(source[start:], *parameters, strict=True))
    )


@_checks(aten.native_group_norm.default, variable=(4, 6))
def _group_norm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """The channels have lost what scale and shift have, and the remaining groups are left with equally many.

    The statistics change with the cut, as they must.
    """
    source, *parameters = operands
    out = results[0]
    same = all(len(masks) == 1 for masks in parameters) and same_masks(
        source[1], out[1], *(masks[0] for masks in parameters)
    )
    if not same or not all_kept(
        [source[0], *source[2:], out[0], *out[2:], *(m for r in results[1:] for m in r)]
    ):
        return False
    sizes = element_mask([dense.shapes[0][1]], [source[1]]).reshape(int(dense.call.args[6]), -1).sum(axis=1)
    return len(set(sizes[sizes > 0].tolist())) == 1 and np.count_nonzero(sizes) == small.call.args[6]


@_checks(aten.constant_pad_nd.default)
def _padded(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Nothing is removed along a padded dimension, and the same along the others."""
    source, out, widths = operands[0], results[0], dense.call.args[1]
    padded = {len(source) - 1 - at // 2 for at, width in enumerate(widths) if width}
    return len(operands) == 1 and all(
        mask is None and other is None if dim in padded else same_masks(mask, other)
        for dim, (mask, other) in enumerate(zip(source, out, strict=True))
    )


@_checks(aten.mm.default, aten.bmm.default)
def _product(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    left, right = operands
    out = results[0]
    return (
        same_masks(left[-1], right[-2])
        and same_masks(left[-2], out[-2])
        and same_masks(right[-1], out[-1])
        and (len(out) == 2 or same_masks(left[0], right[0], out[0]))
    )


@_checks(aten.addmm.default)
def _addmm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    bias, *factors = operands
    return len(bias) == 1 and same_masks(bias[0], results[0][1]) and _product(dense, small, factors, results)


@_checks(aten.scaled_dot_product_attention.default)
def _attention(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Each head of keys and values has lost all of its heads of queries, or none of them."""
    (query, key, value), out = operands[:3], results[0]
    if len(operands) > 3 or len(query) < 3 or not all_kept([*query[:-3], query[-2], *key[:-3], key[-2]]):
        return False
    same = (
        same_masks(query[-1], key[-1]) and same_masks(value[-1], out[-1]) and same_masks(query[-3], out[-3])
    )
    heads, others = dense.shapes[0][-3], dense.shapes[1][-3]
    if not same or not same_masks(key[-3], value[-3]) or heads % others or heads == others:
        return same and heads == others and same_masks(query[-3], key[-3], value[-3])
    groups = element_mask([heads], [query[-3]]).reshape(others, -1)
    return bool((groups == element_mask([others], [key[-3]])[:, None]).all())


@_checks(aten.t.default, aten.transpose.int, aten.permute.default)
def _permuted(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source = operands[0]
    if dense.call.op is aten.permute.default:
        places = [int(dim) % len(source) for dim in dense.call.args[1]]
    else:
        places = list(range(len(source)))
        one, other = (int(dim) % max(len(source), 1) for dim in (dense.call.args[1:3] or (0, -1)))
        if len(source) > 1:
            places[one], places[other] = places[other], places[one]
    return all(same_masks(source[place], mask) for place, mask in zip(places, results[0], strict=True))


@_checks(
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_nearest2d.default,
)
def _within_channels(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source = operands[0]
    return (
        all_kept(source[-2:])
        and all(all_kept(out[-2:]) for out in results)
        and all(same_masks(*masks) for masks in zip(source[:-2], *(out[:-2] for out in results), strict=True))
    )


@_checks(aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default)
def _reduced(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Nothing is removed along a reduced dimension, unless a statistic is taken over it, which the cut changes."""
    source, count = operands[0], len(operands[0])
    dims = dense.call.arg("dim")
    reduced = {int(dim) % count for dim in ([dims] if isinstance(dims, int) else dims or range(count))}
    keep = bool(dense.call.arg("keepdim"))
    left = [None if dim in reduced else source[dim] for dim in range(count) if keep or dim not in reduced]
    is_statistic = dense.mixes_channels and dense.call.op is not aten.sum.dim_IntList
    return (is_statistic or all_kept([source[dim] for dim in reduced])) and all(
        same_masks(mask, out) for mask, out in zip(left, results[0], strict=True)
    )


@_checks(aten.view.default, aten._unsafe_view.default, aten.reshape.default, variable=(1,))
def _reshaped(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Elements keep their order, so the same ones must survive in each run of merged or split dimensions."""
    before, after = dense.shapes[0], dense.call.outputs[0].shape
    runs = matching_dims(before, after)
    return runs is not None and all(
        same_elements(before[a], operands[0][a], after[b], results[0][b]) for a, b in runs
    )


@_checks(aten.expand.default, variable=(1,))
def _expanded(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, out = operands[0], results[0]
    new = len(out) - len(source)
    sizes = dense.shapes[0], dense.call.outputs[0].shape[new:]
    return all_kept(out[:new]) and all(
        same_masks(mask, other) if size == wide else mask is None and other is None
        for mask, other, size, wide in zip(source, out[new:], *sizes, strict=True)
    )


@_checks(
    aten.unbind.int, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor
)
def _parts(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Parts are taken along a dimension that has lost nothing."""
    source = list(operands[0])
    dim = int(dense.call.arg("dim")) % len(source)
    left = source[:dim] + source[dim + 1 :] if dense.call.op in (aten.unbind.int, aten.select.int) else source
    return source[dim] is None and all(
        same_masks(*pair) for out in results for pair in zip(left, out, strict=True)
    )


@_checks(aten.cat.default)
def _concatenated(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    out, count = results[0], len(results[0])
    dim = int(dense.call.arg("dim")) % count
    if any(len(masks) != count for masks in operands):
        return False
    pieces = [
        element_mask([read[dim]], [masks[dim]]) for read, masks in zip(dense.shapes, operands, strict=True)
    ]
    kept = np.concatenate(pieces)
    return np.array_equal(kept, element_mask([len(kept)], [out[dim]])) and all(
        same_masks(out[other], *(masks[other] for masks in operands))
        for other in range(count)
        if other != dim
    )
