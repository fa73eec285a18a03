"""Optimizer state that follows the cut (level 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.utils.modules import cut

__all__ = ["Sliced", "cut_state_", "snapshot"]

#: torch's Adafactor keeps means over one dimension, which then has size 1. Other libraries choose that dimension
#: by the parameter's size, so a cut may change their mind: their state starts afresh.
FACTORED = {"row_var": -1, "col_var": -2}
NAMED = 3


class Sliced(NamedTuple):
    """A parameter that was cut: its shape before, and the surviving indices of dimensions that lost some."""

    parameter: Tensor
    before: torch.Size
    dims: Mapping[int, list[int]]


def cut_state_(optimizer: Optimizer, sliced: Mapping[str, Sliced]) -> None:
    """Cut the state that ``optimizer`` holds for parameters by the same indices.

    Entries of a parameter's shape are sliced, so are the row and column factors of Adafactor; numbers stay. What
    has another shape for any parameter cannot be cut safely: parameters that hold it start afresh, with a
    warning. So does all of L-BFGS, whose history runs over all parameters at once. Parameter groups, their order
    and options, and with them the schedulers, stay as they are.

    Args:
        optimizer: its ``state`` is changed in place.
        sliced: name -> a parameter that was already cut; those that the optimizer does not know are passed over.

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.grad = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        >>> optimizer.step()
        >>> before, weight.data = weight.shape, weight.data[[0, 2]]
        >>> cut_state_(optimizer, {"weight": Sliced(weight, before, {0: [0, 2]})})
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([[1., 1.],
                [3., 3.]])
    """
    if isinstance(optimizer, LBFGS):
        _forget(optimizer, sliced.values())
        return
    known = {name: part for name, part in sliced.items() if optimizer.state.get(part.parameter)}
    strange = _strange(optimizer, known.values())
    afresh = [name for name, part in known.items() if strange & set(optimizer.state[part.parameter])]
    if afresh:
        _warn(optimizer, afresh, sorted(map(str, strange)))
    for name, part in known.items():
        state = optimizer.state.pop(part.parameter)
        if name not in afresh:
            cut_along = {key: _cut_entry(key, value, part) for key, value in state.items()}
            optimizer.state[part.parameter] = cut_along


def _forget(optimizer: LBFGS, sliced: Iterable[Sliced]) -> None:
    """L-BFGS keeps flat vectors over all its parameters, and their total number."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(part.parameter) in held for part in sliced):
        optimizer._numel_cache = None
        if optimizer.state:
            _warn(optimizer, [], ["its history of all parameters"])
            optimizer.state.clear()


def _strange(optimizer: Optimizer, sliced: Iterable[Sliced]) -> set[Any]:
    """Entries that do not run along the dimensions of every parameter that has them.

    A (n, n) preconditioner of a (n, n) weight looks like a moment; that of a (n, m) weight tells.
    """
    parts = {part.parameter: part for part in sliced}
    whole = (parts.get(p) or Sliced(p, p.shape, {}) for p in optimizer.state if isinstance(p, Tensor))
    return {
        key
        for part in whole
        for key, value in optimizer.state[part.parameter].items()
        if not _is_plain(value) and _along(key, value, part) is None
    }


def _is_plain(value: Any) -> bool:
    """Whether an entry has no dimensions to cut: a number, a flag, a count of steps."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    return _is_tensor(value) and value.numel() == 1


def _is_tensor(value: Any) -> bool:
    """Subclasses (quantised, distributed) may hold more than they show."""
    return type(value) in (Tensor, nn.Parameter)


def _along(key: Any, value: Any, part: Sliced) -> dict[int, list[int]] | None:
    """Surviving indices of each dimension of an entry, or None if it is not clear what its dimensions are."""
    shape = list(part.before)
    mean = FACTORED[key] % len(shape) if key in FACTORED and len(shape) > 1 else None
    if mean is not None:
        shape[mean] = 1
    fits = _is_tensor(value) and list(value.shape) == shape
    return {dim: kept for dim, kept in part.dims.items() if dim != mean} if fits else None


def _cut_entry(key: Any, value: Any, part: Sliced) -> Any:
    dims = None if _is_plain(value) else _along(key, value, part)
    return cut(value, dims) if dims else value


def _warn(optimizer: Optimizer, names: list[str], entries: list[str]) -> None:
    shown = ", ".join(map(repr, names[:NAMED])) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")
    of = f" of {shown}" if names else ""
    message = f"{type(optimizer).__name__} state{of} starts afresh: {', '.join(entries)} cannot be cut along"
    warnings.warn(message, stacklevel=4)


def snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """A function that puts the optimizer's state back as it is now (the tensors are not copied)."""
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(before)
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None

    return restore
