"""Reshapes: which factor of a split dimension can shrink, and what follows (level 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import sizes
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.traced_int import (
    Attribute,
    Size,
    TensorSize,
    TracedInt,
    _value,
    leaves,
    solve,
)
from lightning_prune.tracing.tracker import Tracker

__all__ = ["among", "factor", "fits", "groups", "shrunk", "solve"]

Gone = Callable[[Ids], Tensor]  # says of each id whether it is removed

aten = torch.ops.aten
UNSPLIT = "is split, and no factor of it can shrink"


def groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Pair runs of dimensions of equal size product, the shortest runs first.

    Example:
        >>> [(list(a), list(b)) for a, b in groups((1, 12, 5, 5), (1, 3, 4, 25))]
        [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    i = j = 0
    while i < len(before) and j < len(after):
        first, second, left, right = i, j, before[i], after[j]
        while left != right:
            if left < right:
                i += 1
                left *= before[i]
            else:
                j += 1
                right *= after[j]
        i, j = i + 1, j + 1
        yield range(first, i), range(second, j)
    if i < len(before):
        yield range(i, len(before)), range(0)


@dataclass(frozen=True)
class Choice:
    """Along which dimension channels go where one dimension was split in several."""

    dim: int
    pinned: bool = False
    foreign: bool = False  # tied to the dimension of another tensor, whose size the code passed


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten._reshape_copy)
def view(call: OperatorCall, tracker: Tracker) -> None:
    """Follow ids through a reshape, one group of dimensions at a time."""
    source, out = call.args[0], call.out
    passed = sizes(call, list(out.shape))
    labels: list[list[Ids]] = [[] for _ in out.shape]
    for inner, outer in _grouped(source.shape, out.shape, tracker):
        for dim in inner:
            for ids in tracker.labels(source)[dim]:
                shape = [source.shape[d] for d in inner]
                grid = _spread(ids, dim - inner.start, shape, [out.shape[d] for d in outer])
                chosen = factor(grid, [passed[d] for d in outer], tracker)
                if chosen is not None and outer:
                    labels[outer[chosen[0]]].append(chosen[1])
    tracker.label(out, labels)
    tracker.sized(passed, out)


def _grouped(before: Sequence[int], after: Sequence[int], tracker: Tracker) -> list[tuple[range, range]]:
    """The groups, as they were in the dense network where that still fits."""
    found = tracker.before("groups")
    rank = (len(before), len(after))
    if found is None or found[0] != rank or any(_size(before, a) != _size(after, b) for a, b in found[1]):
        found = rank, list(groups(before, after))
    tracker.decided("groups", found)
    return found[1]


def _size(shape: Sequence[int], dims: range) -> int:
    return prod(shape[dim] for dim in dims)


def _spread(ids: Ids, dim: int, shape: list[int], new_shape: list[int]) -> Tensor:
    """The ids of one dimension, over a whole group of dimensions, in their new shape."""
    ones = [1] * len(shape)
    ones[dim] = len(ids)
    return ids.view(ones).expand(shape).reshape(new_shape)


def factor(grid: Tensor, passed: Sequence[Size], tracker: Tracker) -> tuple[int, Ids] | None:
    """Choose the dimension of ``grid`` along which channels can go; what stays must be a rectangle.

    Args:
        grid: ids over the new dimensions.
        passed: the size of each as the code passed it.
        tracker: ties the ids across the other dimensions, or pins all where no dimension can shrink.

    Returns:
        The dimension and the ids along it, or None if there are no dimensions.
    """
    if not grid.dim():
        return None
    choice = _again(grid, tracker.before("factor"), passed, tracker) or _choose(grid, passed, tracker)
    tracker.decided("factor", choice)
    return choice.dim, _along(grid, choice.dim)


def _again(grid: Tensor, before: Choice | None, passed: Sequence[Size], tracker: Tracker) -> Choice | None:
    """The smaller network is read as the dense one was; that it may be is what the proof checks."""
    if before is None or before.dim >= grid.dim():
        return None
    if before.pinned:
        tracker.pin(grid.flatten(), UNSPLIT)
        return before
    ids = tracker.tie_across(_rows(grid, before.dim))
    other = _foreign(grid, before.dim, passed, tracker) if before.foreign else None
    if other is not None:
        tracker.tie(ids, other)
    return before


def _choose(grid: Tensor, passed: Sequence[Size], tracker: Tracker) -> Choice:
    varying = [dim for dim in range(grid.dim()) if _varies(grid, dim)]
    if not varying:
        return Choice(_single(grid, passed))
    for dim in sorted(varying, key=lambda d: _preference(passed[d])):
        if len(varying) == 1 and passed[dim] is None:
            return Choice(dim)
        if _rectangle(grid, dim, passed, tracker):
            ids = tracker.tie_across(_rows(grid, dim))
            if _settable(passed[dim]):  # tensors' sizes follow by themselves
                tracker.use(passed[dim], ids)
            return Choice(dim)
    for dim in varying:
        if (other := _foreign(grid, dim, passed, tracker)) is not None:
            tracker.tie(tracker.tie_across(_rows(grid, dim)), other)
            return Choice(dim, foreign=True)
    tracker.pin(grid.flatten(), UNSPLIT)
    return Choice(varying[0], pinned=True)


def _settable(size: Size) -> bool:
    found = list(leaves(size)) if size is not None else []
    return not found or any(isinstance(leaf, Attribute) for leaf in found)


def _single(grid: Tensor, passed: Sequence[Size]) -> int:
    """One id only (a dimension may have one channel): keep it where a channel would be."""
    return min(range(grid.dim()), key=lambda d: _preference(passed[d]))


def _varies(grid: Tensor, dim: int) -> bool:
    return grid.shape[dim] > 1 and not torch.equal(grid, grid.narrow(dim, 0, 1).expand_as(grid))


def _rows(grid: Tensor, dim: int) -> Tensor:
    """(others, n): the ids along ``dim`` for every position of the other dimensions."""
    return grid.movedim(dim, -1).reshape(-1, grid.shape[dim])


def _along(grid: Tensor, dim: int) -> Ids:
    return _rows(grid, dim)[0].contiguous()


def _constant(size: Size) -> bool:
    return size is not None and not isinstance(size, TracedInt) and size >= 0


def _preference(size: Size) -> int:
    """Heads first (the softmax's scale hangs on the head dimension), then what is free, then other attributes."""
    if not isinstance(size, TracedInt):
        return 1 if size is None or size < 0 else 4
    found = list(leaves(size))
    heads = any(
        isinstance(leaf, Attribute) and "head" in leaf.name and "dim" not in leaf.name for leaf in found
    )
    if any(isinstance(leaf, TensorSize) for leaf in found):
        return 2 if heads else 1
    return 0 if heads and len(found) == 1 else 3


def _rectangle(grid: Tensor, dim: int, passed: Sequence[Size], tracker: Tracker) -> bool:
    """Would every size come out right if the first channel along ``dim`` went?"""
    if passed[dim] is None:
        return False
    gone = among(grid.select(dim, 0).flatten())
    if any(isinstance(leaf, TensorSize) for size in passed if size is not None for leaf in leaves(size)):
        gone = tracker.ties.closure(grid.select(dim, 0).flatten())  # other tensors shrink along
    wanted = list(grid.shape)
    wanted[dim] = int((~gone(_along(grid, dim))).sum())
    values = solve(passed[dim], wanted[dim], shrunk(passed, gone, tracker))
    return values is not None and fits(passed, wanted, values)


def among(ids: Ids) -> Gone:
    """A function that says of each id whether it is one of ``ids``."""
    return lambda asked: torch.isin(asked, ids)


def fits(passed: Sequence[Size], wanted: Sequence[int], values: dict[Any, int]) -> bool:
    """Do the sizes that the code passes evaluate to what is wanted?"""
    pairs = zip(passed, wanted, strict=True)
    return all(size is None or size < 0 or _value(size, values) == want for size, want in pairs)


def shrunk(passed: Sequence[Size], gone: Gone, tracker: Tracker) -> dict[Any, int]:
    """Sizes of tensors that the code's sizes were computed from, once the ids that are ``gone`` are removed."""
    values: dict[Any, int] = {}
    for size in passed:
        tracker.remember(size)
        for leaf in leaves(size) if size is not None else ():
            ids = tracker.sizes.get(leaf.key) if isinstance(leaf, TensorSize) else None
            if ids is not None:
                values[leaf.key] = int((~gone(ids)).sum())
    return values


def _foreign(grid: Tensor, dim: int, passed: Sequence[Size], tracker: Tracker) -> Ids | None:
    """The ids of another tensor's dimension, if its size is what the code passes for ``dim``, and nothing else."""
    size = passed[dim]
    if not isinstance(size, TracedInt) or not isinstance(size.expression, TensorSize):
        return None
    tracker.remember(size)
    ids = tracker.sizes[size.expression.key]
    wanted = [n - (d == dim) for d, n in enumerate(grid.shape)]
    alone = fits(passed, wanted, {size.expression.key: wanted[dim]})
    return ids if ids is not None and len(ids) == grid.shape[dim] and alone else None
