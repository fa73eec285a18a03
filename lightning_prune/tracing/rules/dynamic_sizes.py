"""Pin channels whose number determines a size elsewhere, where that size would not fit after a cut.

In ``x.view(b, n, 3, self.heads, c // self.heads)``, ``c`` may be the number of channels of another tensor. These
channels may be removed only if the reshape still fits. Which channels are removed together is known only when the
whole network has been traced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.passed_sizes import sizes_match
from lightning_prune.tracing.traced_int import Attribute, TensorSize, TracedInt, leaves, solve
from lightning_prune.tracing.tracker import TracedReshape, Tracker

__all__ = ["pin_converted_size", "pin_mismatched_sizes", "require_equality"]

Components = NDArray[np.int64]
MISMATCH = "its number sizes a reshape of other channels"


def pin_converted_size(size: TracedInt, tracker: Tracker) -> None:
    """Pin channels whose number ``int(x.shape[1])`` or ``len(x)`` makes a plain int, which cannot be followed."""
    tracker.register_size(size)
    for leaf in leaves(size):
        if isinstance(leaf, TensorSize):
            tracker.pin(
                tracker.sizes[leaf.key], "its number is made plain by int() or len(), and cannot be followed"
            )


def require_equality(pair: tuple[TracedInt, TracedInt], tracker: Tracker) -> None:
    """Set an attribute that the code has compared with a number of channels: ``x.shape[1] != self.num_channels``.

    The code raises, or takes another branch, if they differ after a cut.
    """
    for size, attribute in (pair, pair[::-1]):
        read, kept = size.expression, attribute.expression
        if isinstance(read, TensorSize) and isinstance(kept, Attribute):
            ids = tracker.along(read.tensor, read.dim)
            if ids is not None:
                tracker.require_size(attribute, ids)


def pin_mismatched_sizes(tracker: Tracker) -> None:
    """Try each reshape without each component of ids; pin the component where the sizes do not match."""
    if not tracker.reshapes:
        return
    components = tracker.ties.components()
    for reshape in tracker.reshapes:
        for ids in _mismatched_ids(reshape, tracker, components):
            tracker.ties.pin(ids, MISMATCH, reshape.where)


def _mismatched_ids(reshape: TracedReshape, tracker: Tracker, components: Components) -> Iterator[Ids]:
    """Yield the ids, along each size that the reshape reads, whose removal makes its sizes wrong."""
    size_of = {leaf.key: leaf for size in reshape.passed if size is not None for leaf in leaves(size)}
    ids_of = {key: ids for key in size_of if (ids := tracker.sizes.get(key)) is not None}
    components_of = {key: components[ids.numpy()] for key, ids in ids_of.items()}
    removable = np.unique(np.concatenate(list(components_of.values())))
    read_losses = [_count_lost(removable, [array]) for array in components_of.values()]
    result_losses = [
        _count_lost(removable, [components[ids.numpy()] for ids in dim]) for dim in reshape.labels
    ]
    # Most components remove the same numbers of indices: check each distinct case once.
    cases, case_of = _distinct_columns(np.stack([*read_losses, *result_losses]))
    for case, losses in enumerate(cases.T.tolist()):
        values = {key: size_of[key].value - lost for key, lost in zip(ids_of, losses, strict=False)}
        if not _sizes_match_after(reshape, values, losses[len(ids_of) :]):
            mismatched = removable[case_of == case]
            for key, array in components_of.items():
                yield ids_of[key][torch.from_numpy(np.isin(array, mismatched))]


def _distinct_columns(losses: Components) -> tuple[Components, Components]:
    """Return the distinct columns of a matrix, and the number of the one that each column equals."""
    if (losses == losses[:, :1]).all():  # by far the most frequent
        return losses[:, :1], np.zeros(losses.shape[1], np.int64)
    sizes = losses.max(axis=1) + 1
    if math.prod(sizes.tolist()) >= 2**62:
        cases, case_of = np.unique(losses, axis=1, return_inverse=True)
        return cases, case_of.ravel()
    # As one number each they are sorted ten times as fast, in the same order.
    keys = np.ravel_multi_index(tuple(losses), tuple(sizes))
    _, firsts, case_of = np.unique(keys, return_index=True, return_inverse=True)
    return losses[:, firsts], case_of.ravel()


def _count_lost(removable: Components, arrays: Iterable[Components]) -> Components:
    """Count how many indices of one dimension are lost with each removable component.

    Args:
        removable: components, sorted.
        arrays: the component of each index, for each id array along the dimension. An index is lost with any of them.

    Returns:
        Numbers of indices, of the length of ``removable``.
    """
    total = np.zeros(len(removable), np.int64)
    counted: list[Components] = []
    for array in arrays:
        # Two arrays with the same component at the same index lose this index once.
        duplicate = (
            np.any([array == other for other in counted], axis=0) if counted else np.zeros(len(array), bool)
        )
        position = np.searchsorted(removable, array[~duplicate])
        inside = position < len(removable)
        match = inside & (removable[np.minimum(position, len(removable) - 1)] == array[~duplicate])
        total += np.bincount(position[match], minlength=len(removable))
        counted.append(array)
    return total


def _sizes_match_after(reshape: TracedReshape, values: dict[Any, int], losses: list[int]) -> bool:
    """Return whether attributes can be set such that a reshape fits after its dimensions lost some indices."""
    targets = [size - lost for size, lost in zip(reshape.shape, losses, strict=True)]
    solution: dict[Any, int] | None = values
    for size, target in zip(reshape.passed, targets, strict=True):
        solution = solve(size, target, solution) if solution is not None else None
    return solution is not None and sizes_match(reshape.passed, targets, solution)
