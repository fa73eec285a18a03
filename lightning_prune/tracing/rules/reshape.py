"""Rule of reshapes: where a dimension is split, decide along which of the new ones channels can be removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import labels_from_sizes, passed_sizes
from lightning_prune.tracing.rules.decisions import as_in_dense
from lightning_prune.tracing.rules.passed_sizes import (
    divided_ids,
    foreign_ids,
    is_among,
    remaining_sizes,
    sizes_match,
)
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.traced_int import (
    Attribute,
    PassedSize,
    TensorSize,
    TracedInt,
    leaves,
    solve,
)
from lightning_prune.tracing.tracker import Labels, Tracker

__all__ = ["choose_factor", "matching_dims"]

aten = torch.ops.aten
#: Parts of names that stand for the width of a head, not for the number of heads: attention_head_size, d_head.
_WIDTH_OF_A_HEAD = ("dim", "size", "width", "channel", "feature", "per_head", "d_head")
UNSPLIT = "is split, and no factor of it can shrink"


def matching_dims(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Pair consecutive dimensions of two shapes that have the same product, as few dimensions as possible at a time.

    Args:
        before: shape before a reshape.
        after: shape after it.

    Yields:
        The dimensions of ``before`` and those of ``after`` that they become.

    Example:
        >>> [(list(a), list(b)) for a, b in matching_dims((1, 12, 5, 5), (1, 3, 4, 25))]
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
    """The dimension along which channels can be removed after a split.

    Attributes:
        dim: its number among the new dimensions.
        pinned: no dimension can shrink; the ids are pinned.
        foreign: the ids are tied to those of another tensor, whose size the code passed.
        divided: they are tied to groups of those of another tensor, of whose size the code passed a part.
    """

    dim: int
    pinned: bool = False
    foreign: bool = False
    divided: bool = False


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten._reshape_copy)
def view(call: OperatorCall, tracker: Tracker) -> None:
    """Follow ids through a reshape, one group of matching dimensions at a time."""
    source, out = call.args[0], call.out
    passed = passed_sizes(call, list(out.shape))
    before, after = _with_one_for_none(source, tracker), [size or 1 for size in out.shape]
    # Any shape without elements fits: only the sizes say what the dimensions are.
    if prod(before) != prod(after):
        tracker.label(out, labels_from_sizes(passed, tracker))
        return
    labels: list[list[Ids]] = [[] for _ in out.shape]
    for inner, outer in _groups(before, after, tracker):
        shape, new_shape = [before[dim] for dim in inner], [after[dim] for dim in outer]
        labels_before = _without_pinned(tracker.labels(source), inner, len(outer), tracker)
        for dim in inner:
            single = _is_single_beside_others(source, dim, inner, new_shape, tracker)
            for ids in labels_before[dim]:
                if single:
                    tracker.pin(ids, "is the only one along a dimension that is merged with another")
                    continue
                grid = _reshaped_ids(ids, dim - inner.start, shape, new_shape)
                factor = choose_factor(grid, [passed[d] for d in outer], tracker)
                if factor is not None and outer:
                    labels[outer[factor[0]]].append(factor[1])
    for size, arrays in zip(passed, labels, strict=True):
        if len(arrays) > 1:
            tracker.require_size_of_all(size, arrays)
    tracker.label(out, labels)
    tracker.register_reshape(passed, out)


def _without_pinned(labels: Labels, inner: range, num_outer: int, tracker: Tracker) -> Labels:
    """Return the labels before dimensions are merged, without ids that must stay: the others decide what is removed.

    So heads of a fixed number do not pin the channels within each head.
    """
    merged = [dim for dim in inner if labels[dim]]
    if num_outer != 1 or len(merged) < 2:
        return labels
    pinned = tracker.ties.pinned_so_far()
    fixed = tuple(dim for dim in merged if all(bool(pinned(ids).all()) for ids in labels[dim]))
    dropped = as_in_dense("merged", fixed if len(fixed) < len(merged) else (), tracker)
    return tuple(() if dim in dropped else arrays for dim, arrays in enumerate(labels))


def _with_one_for_none(source: Tensor, tracker: Tracker) -> list[int]:
    """Return the sizes of a tensor, with 1 in place of 0 where values left nothing, such as no boxes.

    Where all channels were removed, the dimension stays 0.
    """
    return [
        size or int(not labels) for size, labels in zip(source.shape, tracker.labels(source), strict=True)
    ]


def _is_single_beside_others(
    source: Tensor, dim: int, inner: range, new_shape: list[int], tracker: Tracker
) -> bool:
    """Return whether one index is merged into a dimension of other channels, in which it tells none from another.

    Its id, repeated along them, would tie all of them: the (1, 1, width) of a class token, flattened.
    """
    beside = any(source.shape[other] > 1 and tracker.labels(source)[other] for other in inner if other != dim)
    single = source.shape[dim] == 1 and beside and 1 not in new_shape
    return bool(tracker.labels(source)[dim]) and as_in_dense("single", single, tracker)


def _groups(before: Sequence[int], after: Sequence[int], tracker: Tracker) -> list[tuple[range, range]]:
    """Return the matching dimensions: those of the dense network, if they still match after the cut."""
    decision = tracker.dense_decision("groups")
    ranks = (len(before), len(after))
    if decision is None or decision[0] != ranks or not _groups_match(before, after, decision[1]):
        decision = ranks, list(matching_dims(before, after))
    tracker.record_decision("groups", decision)
    return decision[1]


def _groups_match(before: Sequence[int], after: Sequence[int], groups: list[tuple[range, range]]) -> bool:
    return all(prod(before[d] for d in inner) == prod(after[d] for d in outer) for inner, outer in groups)


def _reshaped_ids(ids: Ids, dim: int, shape: list[int], new_shape: list[int]) -> Tensor:
    """Return the ids along dimension ``dim`` of ``shape``, repeated along its other dimensions, in a new shape."""
    ones = [1] * len(shape)
    ones[dim] = len(ids)
    return ids.view(ones).expand(shape).reshape(new_shape)


def choose_factor(grid: Tensor, passed: Sequence[PassedSize], tracker: Tracker) -> tuple[int, Ids] | None:
    """Choose the dimension of ``grid`` along which channels can be removed, such that the rest is a rectangle.

    Args:
        grid: ids over the new dimensions.
        passed: the size of each new dimension, as the code passed it.
        tracker: ties the ids across the other dimensions, or pins them all if no dimension can shrink.

    Returns:
        The dimension and the ids along it; None if there are no dimensions.
    """
    if not grid.dim():
        return None
    dense = tracker.dense_decision("factor")
    choice = _repeat_choice(grid, dense, passed, tracker) or _new_choice(grid, passed, tracker)
    tracker.record_decision("factor", choice)
    return choice.dim, _ids_along(grid, choice.dim)


def _repeat_choice(
    grid: Tensor, dense: Choice | None, passed: Sequence[PassedSize], tracker: Tracker
) -> Choice | None:
    """Make the choice of the dense network again in the smaller one; None in the dense network itself."""
    if dense is None or dense.dim >= grid.dim():
        return None
    if dense.pinned:
        tracker.pin(grid.flatten(), UNSPLIT)
        return dense
    ids = tracker.tie_across(_rows(grid, dense.dim))
    other = foreign_ids(grid, dense.dim, passed, tracker) if dense.foreign else None
    other = divided_ids(grid, dense.dim, passed, tracker) if dense.divided else other
    if other is not None:
        tracker.tie(ids, other)
    return dense


def _new_choice(grid: Tensor, passed: Sequence[PassedSize], tracker: Tracker) -> Choice:
    varying = [dim for dim in range(grid.dim()) if _varies_along(grid, dim)]
    if not varying:  # a single channel: label the dimension where channels most probably are
        return Choice(min(range(grid.dim()), key=lambda dim: _rank_size(passed[dim])))
    for dim in sorted(varying, key=lambda dim: _rank_size(passed[dim])):
        if len(varying) == 1 and passed[dim] is None:  # nothing to tie, and no size to set
            return Choice(dim)
        if _can_shrink(grid, dim, passed, tracker):
            ids = tracker.tie_across(_rows(grid, dim))
            if not _follows_tensors(passed[dim]):
                tracker.require_size(passed[dim], ids)
            return Choice(dim)
        if (other := foreign_ids(grid, dim, passed, tracker)) is not None:
            tracker.tie(tracker.tie_across(_rows(grid, dim)), other)
            return Choice(dim, foreign=True)
    for dim in varying:
        if (groups := divided_ids(grid, dim, passed, tracker)) is not None:
            tracker.tie(tracker.tie_across(_rows(grid, dim)), groups)
            return Choice(dim, divided=True)
    tracker.pin(grid.flatten(), UNSPLIT)
    return Choice(varying[0], pinned=True)


def _follows_tensors(size: PassedSize) -> bool:
    """Return whether a size is computed from sizes of tensors alone, and so needs no attribute to be set."""
    origins = list(leaves(size)) if size is not None else []
    return bool(origins) and not any(isinstance(leaf, Attribute) for leaf in origins)


def _varies_along(grid: Tensor, dim: int) -> bool:
    return grid.shape[dim] > 1 and not torch.equal(grid, grid.narrow(dim, 0, 1).expand_as(grid))


def _rows(grid: Tensor, dim: int) -> Tensor:
    """Return the ids along ``dim`` for every position of the other dimensions, shape (positions, n)."""
    return grid.movedim(dim, -1).reshape(-1, grid.shape[dim])


def _ids_along(grid: Tensor, dim: int) -> Ids:
    return _rows(grid, dim)[0].contiguous()


def _rank_size(size: PassedSize) -> int:
    """Rank a passed size: channels are removed along the dimension of the lowest rank that can shrink.

    Numbers of heads come first, since the scale of the softmax depends on the width of a head; then sizes that follow
    by themselves, other attributes, and constants.
    """
    if not isinstance(size, TracedInt):
        return 1 if size is None or size < 0 else 4
    origins = list(leaves(size))
    is_heads = any(isinstance(leaf, Attribute) and _is_heads(leaf) for leaf in origins)
    if any(isinstance(leaf, TensorSize) for leaf in origins):
        return 2 if is_heads else 1
    return 0 if is_heads and len(origins) == 1 else 3


def _is_heads(attribute: Attribute) -> bool:
    if isinstance(attribute.item, str):  # an axis of an einops layer
        return attribute.item in ("h", "heads", "nh")
    name = attribute.name.lower()
    return "head" in name and not any(word in name for word in _WIDTH_OF_A_HEAD)


def _can_shrink(grid: Tensor, dim: int, passed: Sequence[PassedSize], tracker: Tracker) -> bool:
    """Return whether all passed sizes would match if the first channel along ``dim`` were removed."""
    if passed[dim] is None:
        return False
    first = grid.select(dim, 0).flatten()
    is_removed = is_among(first)
    if any(isinstance(leaf, TensorSize) for size in passed if size is not None for leaf in leaves(size)):
        is_removed = tracker.ties.closure(first)  # the other tensors lose all channels that are tied to these
    target = list(grid.shape)
    target[dim] = int((~is_removed(_ids_along(grid, dim))).sum())
    values = solve(passed[dim], target[dim], remaining_sizes(passed, is_removed, tracker))
    return values is not None and sizes_match(passed, target, values)
