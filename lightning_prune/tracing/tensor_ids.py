"""Ids of the dimensions of a model's parameters and buffers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.tracing.ids import Ids, Ties
from lightning_prune.utils.module_walk import named_buffers, named_parameters

__all__ = ["TensorIds", "TensorOrigin"]


@dataclass(slots=True, eq=False)
class TensorOrigin:
    """One dimension of a parameter or buffer, by the tensor's name, and its ids."""

    name: str
    dim: int
    ids: Ids


class TensorIds:
    """Assign ids to every dimension of every parameter and buffer, and find the dimension that ids belong to.

    Args:
        model: the network.
        ties: gives fresh ids.
        initial: id arrays to use instead of fresh ones, name -> dimension -> ids.
    """

    def __init__(self, model: nn.Module, ties: Ties, initial: Mapping[str, Mapping[int, Ids]]) -> None:
        self.by_name: dict[str, dict[int, Ids]] = {}
        self._names_by_memory: dict[int, str] = {}
        self.tensors = [*named_parameters(model), *named_buffers(model)]
        shapes = [tensor.shape for _, tensor in self.tensors]
        fresh = iter(() if initial else ties.fresh_arrays([size for shape in shapes for size in shape]))
        for (name, tensor), shape in zip(self.tensors, shapes, strict=True):
            ids = initial.get(name, {})
            sizes = enumerate(shape)
            self.by_name[name] = {
                dim: (ids[dim] if dim in ids else ties.fresh(size)) if initial else next(fresh)
                for dim, size in sizes
            }
            # Sparse and meta tensors have no memory of their own that an alias could share.
            if tensor.numel() and tensor.layout is torch.strided and not tensor.is_meta:
                self._names_by_memory[tensor.untyped_storage().data_ptr()] = name
        origins = [
            TensorOrigin(name, dim, ids)
            for name, dims in self.by_name.items()
            for dim, ids in dims.items()
            if ids.numel()
        ]
        # Each array has a first id of its own, so a binary search by first id finds the only candidate.
        first_ids = [origin.ids.numpy()[0].item() for origin in origins]
        order = sorted(range(len(origins)), key=first_ids.__getitem__)
        self._origins = [origins[at] for at in order]
        self._first_ids = [first_ids[at] for at in order]

    def origin(self, ids: Ids | None) -> TensorOrigin | None:
        """Return the dimension whose ids are exactly ``ids``, in the same order; None if there is none."""
        if ids is None or not len(ids):
            return None
        origin = self._origins[bisect_right(self._first_ids, int(ids[0])) - 1]
        return origin if torch.equal(origin.ids, ids) else None

    def of_alias(self, tensor: Tensor) -> dict[int, Ids] | None:
        """Return the ids of ``p.data`` and the like: a tensor of the same shape over a parameter's memory."""
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel() or tensor.is_meta:
            return None
        name = self._names_by_memory.get(tensor.untyped_storage().data_ptr())
        if name is None:
            return None
        dims = self.by_name[name]
        return dims if tuple(len(dims[dim]) for dim in range(len(dims))) == tuple(tensor.shape) else None
