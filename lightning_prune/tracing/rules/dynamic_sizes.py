"""Sizes that the code reads from one tensor and gives to another: whether they follow a cut (level 1).

``x.view(b, n, 3, self.heads, c // self.heads)`` with ``c`` from the block's input: channels of the input may only go
if the result still fits. Which ids go together is known when the whole network has been followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.reshape import fits
from lightning_prune.tracing.traced_int import TensorSize, TracedInt, leaves, solve
from lightning_prune.tracing.tracker import Sized, Tracker

__all__ = ["pin_number", "pin_what_sizes_do_not_follow"]

Components = NDArray[np.int64]
UNFOLLOWED = "its number sizes a reshape of other channels"


def pin_number(size: TracedInt, tracker: Tracker) -> None:
    """``int(x.shape[1])``: the number changes with the channels, but what it is used for cannot be seen."""
    tracker.remember(size)
    for leaf in leaves(size):
        if isinstance(leaf, TensorSize):
            tracker.pin(tracker.sizes[leaf.key], "its number is made plain by int(), and cannot be followed")


def pin_what_sizes_do_not_follow(tracker: Tracker) -> None:
    """Try each reshape without one component of ids; where its sizes do not come out, that component must stay."""
    if not tracker.reshapes:
        return
    components = tracker.ties.components()
    for sized in tracker.reshapes:
        for ids in _unfollowed(sized, tracker, components):
            tracker.ties.pin(ids, UNFOLLOWED, sized.where)


def _unfollowed(sized: Sized, tracker: Tracker, components: Components) -> Iterator[Ids]:
    read = {leaf.key: leaf for size in sized.passed if size is not None for leaf in leaves(size)}
    known = {key: ids for key in read if (ids := tracker.sizes.get(key)) is not None}
    own = {key: components[ids.numpy()] for key, ids in known.items()}
    goes = np.unique(np.concatenate(list(own.values())))
    lost = {key: _count(goes, [array]) for key, array in own.items()}
    gone = [_count(goes, [components[ids.numpy()] for ids in arrays]) for arrays in sized.labels]
    cases, which = np.unique(np.stack([*lost.values(), *gone]), axis=1, return_inverse=True)
    for case, counts in enumerate(cases.T.tolist()):
        values = {key: read[key].value - n for key, n in zip(lost, counts, strict=False)}
        if not _comes_out(sized, values, counts[len(lost) :]):
            stuck = goes[which.ravel() == case]
            for key, array in own.items():
                yield known[key][torch.from_numpy(np.isin(array, stuck))]


def _count(goes: Components, arrays: Iterable[Components]) -> Components:
    """How many indices of a dimension are lost with each component; an index is lost with any of its ids."""
    total = np.zeros(len(goes), np.int64)
    seen: list[Components] = []
    for array in arrays:
        again = np.any([array == other for other in seen], axis=0) if seen else np.zeros(len(array), bool)
        at = np.searchsorted(goes, array[~again])
        hit = at[(at < len(goes)) & (goes[np.minimum(at, len(goes) - 1)] == array[~again])]
        total += np.bincount(hit, minlength=len(goes))
        seen.append(array)
    return total


def _comes_out(sized: Sized, values: dict[Any, int], gone: list[int]) -> bool:
    wanted = [size - lost for size, lost in zip(sized.shape, gone, strict=True)]
    solved: dict[Any, int] | None = values
    for size, want in zip(sized.passed, wanted, strict=True):
        solved = solve(size, want, solved) if solved is not None else None
    return solved is not None and fits(sized.passed, wanted, solved)
