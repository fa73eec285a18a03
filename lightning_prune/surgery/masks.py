"""Arithmetic of masks: what survives of a tensor along each of its dimensions (level 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Mask", "Masks", "alike", "flat", "runs", "same", "surviving_shape", "whole"]

Mask = NDArray[np.bool_] | None  # what survives along one dimension; None: everything
Masks = Sequence[Sequence[Mask]]  # of each operand or result, along each dimension


def surviving_shape(tensor: Tensor, masks: Sequence[Mask]) -> list[int]:
    """The shape that survives."""
    return [
        size if mask is None else int(np.count_nonzero(mask))
        for size, mask in zip(tensor.shape, masks, strict=True)
    ]


def same(*masks: Mask) -> bool:
    """Whether all lost the same."""
    first, *rest = masks
    if first is None:
        return all(mask is None for mask in rest)
    return all(mask is first or (mask is not None and np.array_equal(mask, first)) for mask in rest)


def whole(masks: Sequence[Mask]) -> bool:
    """Whether nothing was lost."""
    return all(mask is None for mask in masks)


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[slice, slice]] | None:
    """The shortest runs of dimensions of both shapes that hold the same number of elements.

    Not :func:`~lightning_prune.tracing.rules.reshape.groups`: what checks the rules must not share their mistakes.
    """
    groups, a, b = [], 0, 0
    if 0 in before:
        return None
    while a < len(before) or b < len(after):
        start, one, other = (a, b), 1, 1
        while one != other or (a, b) == start:
            if (one <= other and a < len(before)) or b == len(after):
                one, a = one * before[a], a + 1
            else:
                other, b = other * after[b], b + 1
        groups.append((slice(start[0], a), slice(start[1], b)))
    return groups


def alike(
    before: Sequence[int], operand: Sequence[Mask], after: Sequence[int], result: Sequence[Mask]
) -> bool:
    """Whether the same elements survive in both, counted in order."""
    if whole(operand) and whole(result):
        return True
    return np.array_equal(flat(before, operand), flat(after, result))


def flat(shape: Sequence[int], masks: Sequence[Mask]) -> NDArray[np.bool_]:
    """Which elements survive, in order."""
    survives = np.ones(1, bool)
    for size, mask in zip(shape, masks, strict=True):
        survives = np.logical_and.outer(survives, np.ones(size, bool) if mask is None else mask).ravel()
    return survives
