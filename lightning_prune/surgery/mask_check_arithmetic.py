"""Checks by masks of pointwise operators, contractions, norms, reductions and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from lightning_prune.surgery.mask_registry import CHECKS, checks
from lightning_prune.surgery.masks import (
    Mask,
    Masks,
    all_kept,
    element_mask,
    same_masks,
    surviving_shape,
)
from lightning_prune.tracing.tracker import TracedOperator

__all__ = ["UNTAGGED_POINTWISE", "pointwise"]

aten = torch.ops.aten


def pointwise(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
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
    aten.celu_.default,
    aten.elu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.selu_.default,
    aten.relu_.default,
    aten.silu_.default,
)
CHECKS.update(dict.fromkeys(UNTAGGED_POINTWISE, (pointwise, ())))


@checks(aten.convolution.default, variable=(8,))
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


@checks(aten.native_batch_norm.default)
def _batch_norm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, *parameters = operands
    out = results[0]
    return all_kept([source[0], *source[2:], out[0], *out[2:]]) and same_masks(
        source[1], out[1], *(masks[0] for masks in parameters)
    )


@checks(aten.native_layer_norm.default, variable=(1,))
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


@checks(aten.native_group_norm.default, variable=(4, 6))
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


@checks(aten.constant_pad_nd.default)
def _padded(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Nothing is removed along a padded dimension, and the same along the others."""
    source, out, widths = operands[0], results[0], dense.call.args[1]
    padded = {len(source) - 1 - at // 2 for at, width in enumerate(widths) if width}
    return len(operands) == 1 and all(
        mask is None and other is None if dim in padded else same_masks(mask, other)
        for dim, (mask, other) in enumerate(zip(source, out, strict=True))
    )


@checks(aten.mm.default, aten.bmm.default)
def _product(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    left, right = operands
    out = results[0]
    return (
        same_masks(left[-1], right[-2])
        and same_masks(left[-2], out[-2])
        and same_masks(right[-1], out[-1])
        and (len(out) == 2 or same_masks(left[0], right[0], out[0]))
    )


@checks(aten.addmm.default)
def _addmm(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    bias, *factors = operands
    return len(bias) == 1 and same_masks(bias[0], results[0][1]) and _product(dense, small, factors, results)


@checks(aten.scaled_dot_product_attention.default)
def _attention(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Each head of keys and values has lost all of its heads of queries, or none of them."""
    (query, key, value), out = operands[:3], results[0]
    if len(query) < 3 or not all_kept([*query[:-3], query[-2], *key[:-3], key[-2]]):
        return False
    if not all(_fits_heads(dense, at, operands) for at in range(3, len(operands))):
        return False
    same = (
        same_masks(query[-1], key[-1]) and same_masks(value[-1], out[-1]) and same_masks(query[-3], out[-3])
    )
    heads, others = dense.shapes[0][-3], dense.shapes[1][-3]
    if not same or not same_masks(key[-3], value[-3]) or heads % others or heads == others:
        return same and heads == others and same_masks(query[-3], key[-3], value[-3])
    groups = element_mask([heads], [query[-3]]).reshape(others, -1)
    return bool((groups == element_mask([others], [key[-3]])[:, None]).all())


@checks(
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


@checks(aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default)
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


def _fits_heads(dense: TracedOperator, at: int, operands: Masks) -> bool:
    """Whether what is added to the scores has lost the heads of the queries, unless it is the same for all heads."""
    shape, masks = dense.shapes[at], operands[at]
    if len(shape) < 3 or shape[-3] == 1:
        return all_kept(masks)
    return all_kept([*masks[:-3], *masks[-2:]]) and same_masks(masks[-3], operands[0][-3])


@checks(aten.einsum.default)
def _einsum(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Dimensions of one letter have lost the same indices everywhere."""
    inputs, arrow, output = str(dense.call.args[0]).replace(" ", "").partition("->")
    terms = [*inputs.split(","), output]
    shapes = [*dense.shapes, dense.call.outputs[0].shape]
    masks = [*operands, *results]
    if not arrow or "." in inputs or list(map(len, terms)) != list(map(len, masks)):
        return False
    found: dict[str, tuple[int, Mask]] = {}
    for letter, size, mask in zip("".join(terms), chain(*shapes), chain(*masks), strict=True):
        first_size, first = found.setdefault(letter, (size, mask))
        if size != first_size or not same_masks(mask, first):
            return False
    return True
