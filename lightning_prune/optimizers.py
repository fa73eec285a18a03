"""Optimizer state that follows the cut (level 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.record import cut

__all__ = ["cut_state_", "snapshot"]


def cut_state_(
    optimizer: Optimizer, parameter: Tensor, before: torch.Size, dims: Mapping[int, list[int]], name: str = ""
) -> None:
    """Cut the state that ``optimizer`` holds for ``parameter`` by the same indices.

    Entries of the parameter's old shape are sliced, scalars stay. Anything else cannot be cut safely: it is
    dropped, with a warning, and the optimizer starts it afresh.

    Args:
        optimizer: its ``state`` is changed in place.
        parameter: already cut.
        before: the parameter's shape before the cut.
        dims: dimension -> surviving indices.
        name: the parameter's name, for the warning.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    strange = [key for key, value in state.items() if not _can_be_cut(value, before)]
    if strange:
        entries = ", ".join(map(str, strange))
        message = f"{type(optimizer).__name__} state of {name!r} starts afresh: {entries} cannot be cut along"
        warnings.warn(message, stacklevel=2)
        del optimizer.state[parameter]
        return
    optimizer.state[parameter] = {key: _cut_entry(value, before, dims) for key, value in state.items()}


def _can_be_cut(value: object, before: torch.Size) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1 or value.shape == before


def _cut_entry(value: object, before: torch.Size, dims: Mapping[int, list[int]]) -> object:
    return cut(value, dims) if isinstance(value, Tensor) and value.shape == before and value.dim() else value


def snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """A function that puts the optimizer's state back as it is now (the tensors are not copied)."""
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(before)

    return restore
