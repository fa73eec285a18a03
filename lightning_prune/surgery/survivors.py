"""The part of a tensor that survives a cut: masks and indices of its dimensions, and random values to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.surgery.masks import Mask
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["Survivors", "at_least_float32"]


@dataclass
class Survivors:
    """The ids that survive a cut, and the surviving part of tensors whose dimensions are labelled with ids.

    Attributes:
        alive: which ids of the dense network survive; mask of shape (number of ids,).
        generator: of the random values.
    """

    alive: NDArray[np.bool_]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        # By identity, since many operators share the same id arrays; the arrays are stored so that they stay alive.
        self._masks: dict[int, tuple[Ids, Mask]] = {}

    def mask(self, arrays: Sequence[Ids]) -> Mask:
        """Return the mask of one dimension; an index survives if its id survives in each of ``arrays``."""
        masks = [mask for ids in arrays if (mask := self._mask_of_ids(ids)) is not None]
        return masks[0] if len(masks) == 1 else np.logical_and.reduce(masks) if masks else None

    def _mask_of_ids(self, ids: Ids) -> Mask:
        if id(ids) not in self._masks:
            mask = self.alive[ids.numpy()]
            self._masks[id(ids)] = ids, None if np.count_nonzero(mask) == len(mask) else mask
        return self._masks[id(ids)][1]

    def masks(self, labels: Sequence[Labels]) -> list[list[Mask]]:
        """Return the masks of several tensors, one per dimension."""
        return [[self.mask(arrays) for arrays in dims] for dims in labels]

    def kept(self, arrays: Sequence[Ids]) -> Tensor | None:
        """Return the surviving indices of one dimension; None if all survive."""
        mask = self.mask(arrays)
        return None if mask is None else torch.from_numpy(np.flatnonzero(mask))

    def restrict(self, value: Tensor, labels: Labels) -> Tensor:
        """Return ``value`` without what was removed."""
        for dim, arrays in enumerate(labels):
            if (kept := self.kept(arrays)) is not None:
                value = value.index_select(dim, kept)
        return value

    def random_values(self, shape: Sequence[int], dtype: torch.dtype, labels: Labels) -> Tensor:
        """Return random values, zero where something was removed; all zero for integers, which may be indices."""
        if not dtype.is_floating_point:
            return torch.zeros(list(shape), dtype=dtype)
        values = torch.rand(list(shape), generator=self.generator, dtype=at_least_float32(dtype)) + 0.1
        for dim, arrays in enumerate(labels):
            if (kept := self.kept(arrays)) is not None:
                removed = torch.ones(shape[dim], dtype=torch.bool).index_fill_(0, kept, False)
                values.index_fill_(dim, removed.nonzero().flatten(), 0)
        return values

    def leaves_one(self, operator: TracedOperator) -> bool:
        """Return whether a dimension of a tensor that the operator reads or writes has at most one element left."""
        masks = (self.mask(arrays) for labels in operator.labels for arrays in labels)
        return any(mask is not None and mask.sum() <= 1 for mask in masks)

    def affects(self, operator: TracedOperator) -> bool:
        """Return whether anything that the operator reads or writes was removed."""
        return any(self.mask(arrays) is not None for labels in operator.labels for arrays in labels)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return single precision for half precision, in which the CPU lacks operators; any other type as it is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
