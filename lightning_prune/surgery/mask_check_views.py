"""Checks by masks of operators that move elements: permutations, reshapes, parts and concatenations."""

from __future__ import annotations

import numpy as np
import torch

from lightning_prune.surgery.mask_registry import checks
from lightning_prune.surgery.masks import (
    Masks,
    all_kept,
    element_mask,
    matching_dims,
    same_elements,
    same_masks,
)
from lightning_prune.tracing.tracker import TracedOperator

aten = torch.ops.aten


@checks(aten.t.default, aten.transpose.int, aten.permute.default)
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


@checks(aten.view.default, aten._unsafe_view.default, aten.reshape.default, variable=(1,))
def _reshaped(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Elements keep their order, so the same ones must survive in each run of merged or split dimensions."""
    before, after = dense.shapes[0], dense.call.outputs[0].shape
    runs = matching_dims(before, after)
    return runs is not None and all(
        same_elements(before[a], operands[0][a], after[b], results[0][b]) for a, b in runs
    )


@checks(aten.expand.default, variable=(1,))
def _expanded(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, out = operands[0], results[0]
    new = len(out) - len(source)
    sizes = dense.shapes[0], dense.call.outputs[0].shape[new:]
    return all_kept(out[:new]) and all(
        same_masks(mask, other) if size == wide else mask is None and other is None
        for mask, other, size, wide in zip(source, out[new:], *sizes, strict=True)
    )


@checks(aten.unbind.int, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
def _parts(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Parts are taken along a dimension that has lost nothing."""
    source = list(operands[0])
    dim = int(dense.call.arg("dim")) % len(source)
    left = source[:dim] + source[dim + 1 :] if dense.call.op in (aten.unbind.int, aten.select.int) else source
    return source[dim] is None and all(
        same_masks(*pair) for out in results for pair in zip(left, out, strict=True)
    )


@checks(aten.cat.default)
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


@checks(aten.unsqueeze.default)
def _unsqueezed(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source = list(operands[0])
    dim = int(dense.call.args[1]) % (len(source) + 1)
    return all(map(same_masks, [*source[:dim], None, *source[dim:]], results[0]))


@checks(aten.squeeze.dim)
def _squeezed(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    source, shape = list(operands[0]), dense.shapes[0]
    dim = int(dense.call.args[1]) % max(len(source), 1)
    left = source[:dim] + source[dim + 1 :] if source and shape[dim] == 1 else source
    return len(left) == len(results[0]) and all(map(same_masks, left, results[0]))


@checks(aten.roll.default)
def _rolled(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Nothing is removed along the dimensions that are rolled."""
    source, dims = operands[0], dense.call.arg("dims")
    rolled = {int(dim) % len(source) for dim in ([dims] if isinstance(dims, int) else dims or ())}
    return (
        bool(rolled)
        and all_kept([source[dim] for dim in rolled])
        and all(map(same_masks, source, results[0]))
    )
