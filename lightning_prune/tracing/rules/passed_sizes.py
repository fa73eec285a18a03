"""Sizes that the code passed to a reshape, after a removal of channels, and the ids that these sizes follow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.traced_int import (
    Arithmetic,
    PassedSize,
    TensorSize,
    TracedInt,
    leaves,
    try_evaluate,
)
from lightning_prune.tracing.tracker import Tracker

__all__ = ["IsRemoved", "divided_ids", "foreign_ids", "is_among", "remaining_sizes", "sizes_match"]

#: Returns for each id whether it is removed.
IsRemoved = Callable[[Ids], Tensor]


def is_among(removed: Ids) -> IsRemoved:
    """Return a function that returns for each id whether it is one of ``removed``."""
    return lambda ids: torch.isin(ids, removed)


def sizes_match(passed: Sequence[PassedSize], target: Sequence[int], values: dict[Any, int]) -> bool:
    """Return whether the passed sizes evaluate to ``target``; sizes that torch infers always do.

    Args:
        passed: sizes as the code passed them.
        target: the size that each must have.
        values: key of an attribute or tensor size -> its value after the cut.
    """
    pairs = zip(passed, target, strict=True)
    return all(size is None or size < 0 or try_evaluate(size, values) == expected for size, expected in pairs)


def remaining_sizes(passed: Sequence[PassedSize], is_removed: IsRemoved, tracker: Tracker) -> dict[Any, int]:
    """Return the sizes, after a removal, of all tensors that the passed sizes were computed from."""
    values: dict[Any, int] = {}
    for size in passed:
        tracker.register_size(size)
        for leaf in leaves(size) if size is not None else ():
            ids = tracker.sizes.get(leaf.key) if isinstance(leaf, TensorSize) else None
            if ids is not None:
                values[leaf.key] = int((~is_removed(ids)).sum())
    return values


def foreign_ids(grid: Tensor, dim: int, passed: Sequence[PassedSize], tracker: Tracker) -> Ids | None:
    """Return the ids of another tensor's dimension if the size passed for ``dim``, and no other, was read from it."""
    size = passed[dim]
    if not isinstance(size, TracedInt) or not isinstance(size.expression, TensorSize):
        return None
    tracker.register_size(size)
    ids = tracker.sizes[size.expression.key]
    target = [n - (d == dim) for d, n in enumerate(grid.shape)]
    others_match = sizes_match(passed, target, {size.expression.key: target[dim]})
    return ids if ids is not None and len(ids) == grid.shape[dim] and others_match else None


def divided_ids(grid: Tensor, dim: int, passed: Sequence[PassedSize], tracker: Tracker) -> Ids | None:
    """Tie the ids of another tensor in groups if the size passed for ``dim`` is a whole part of its number.

    In ``qkv.view(b, n, 3, heads, c // heads)`` with ``c`` from the input of the attention, one channel of every head
    is removed together with ``heads`` channels of that input.

    Returns:
        The first ids of the groups, one for each position along ``dim``; None if the size is no such part.
    """
    part = _part(passed[dim])
    if part is None:
        return None
    whole, number = part
    tracker.register_size(passed[dim])
    ids = tracker.sizes[whole.key]
    if ids is None or len(ids) != number * grid.shape[dim]:
        return None
    target = [n - (d == dim) for d, n in enumerate(grid.shape)]
    if not sizes_match(passed, target, {whole.key: len(ids) - number}):
        return None
    return tracker.tie_across(ids.view(-1, number).t()).contiguous()


def _part(size: PassedSize) -> tuple[TensorSize, int] | None:
    """Return the tensor size and the divisor of an expression such as ``x.shape[-1] // self.num_heads``."""
    expression = size.expression if isinstance(size, TracedInt) else None
    if not isinstance(expression, Arithmetic) or expression.operator is not operator.floordiv:
        return None
    whole, divisor = expression.left, expression.right
    if not isinstance(whole, TensorSize) or isinstance(divisor, (TensorSize, Arithmetic)):
        return None
    return whole, divisor if isinstance(divisor, int) else divisor.value
