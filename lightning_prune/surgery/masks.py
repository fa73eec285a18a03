"""Masks of what survives a cut: one per dimension of a tensor, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Mask",
    "Masks",
    "all_kept",
    "element_mask",
    "matching_dims",
    "same_elements",
    "same_masks",
    "surviving_shape",
]

#: Indices of one dimension that survive; None: all of them.
Mask = NDArray[np.bool_] | None
#: For each operand or result, one mask per dimension.
Masks = Sequence[Sequence[Mask]]


def surviving_shape(shape: Sequence[int], masks: Sequence[Mask]) -> list[int]:
    """Return the shape that a tensor of ``shape`` has after the cut."""
    return [
        size if mask is None else int(np.count_nonzero(mask)) for size, mask in zip(shape, masks, strict=True)
    ]


def same_masks(*masks: Mask) -> bool:
    """Whether all masks are equal."""
    first, *others = masks
    if first is None:
        return all(mask is None for mask in others)
    return all(mask is first or (mask is not None and np.array_equal(mask, first)) for mask in others)


def all_kept(masks: Sequence[Mask]) -> bool:
    """Whether nothing is removed along any of the dimensions."""
    return all(mask is None for mask in masks)


def matching_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[slice, slice]] | None:
    """Split two shapes into the shortest runs of dimensions with equal numbers of elements; None if a size is 0.

    This repeats :func:`~lightning_prune.tracing.rules.reshape.matching_dims`, because a check of the rules must not
    share their code.

    Example:
        >>> matching_dims([2, 3, 4], [6, 4])
        [(slice(0, 2, None), slice(0, 1, None)), (slice(2, 3, None), slice(1, 2, None))]
    """
    runs, a, b = [], 0, 0
    if 0 in before:
        return None
    while a < len(before) or b < len(after):
        start, elements_before, elements_after = (a, b), 1, 1
        while elements_before != elements_after or (a, b) == start:
            if (elements_before <= elements_after and a < len(before)) or b == len(after):
                elements_before, a = elements_before * before[a], a + 1
            else:
                elements_after, b = elements_after * after[b], b + 1
        runs.append((slice(start[0], a), slice(start[1], b)))
    return runs


def same_elements(
    before: Sequence[int], operand: Sequence[Mask], after: Sequence[int], result: Sequence[Mask]
) -> bool:
    """Whether the same elements survive, in row-major order, in shape ``before`` and in shape ``after``."""
    if all_kept(operand) and all_kept(result):
        return True
    return np.array_equal(element_mask(before, operand), element_mask(after, result))


def element_mask(shape: Sequence[int], masks: Sequence[Mask]) -> NDArray[np.bool_]:
    """Return which elements survive, in row-major order."""
    elements = np.ones(1, bool)
    for size, mask in zip(shape, masks, strict=True):
        elements = np.logical_and.outer(elements, np.ones(size, bool) if mask is None else mask).ravel()
    return elements
