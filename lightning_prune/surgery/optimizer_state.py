"""Cut the state of optimizers, such as momentum, along with the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.surgery.optimizer_buffers import base_optimizers, buffers_of
from lightning_prune.utils.modules import cut, set_data

__all__ = ["CutParameter", "check_buffers", "cut_state_", "drop_state_"]

#: The row and column factors of torch's Adafactor are means over one dimension, which then has size 1. Other
#: libraries choose that dimension by the parameter's size, which a cut may change: their state is reset.
MEAN_DIMS = {"row_var": -1, "col_var": -2}
MAX_NAMES = 3  # in a warning


class CutParameter(NamedTuple):
    """A parameter that was cut: its shape before, and the surviving indices of dimensions that lost some."""

    parameter: Tensor
    shape_before: torch.Size
    dims: Mapping[int, list[int]]


def cut_state_(optimizer: Optimizer, cut_parameters: Mapping[str, CutParameter]) -> None:
    """Cut the optimizer's state of parameters by the same indices as the parameters.

    The states of optimizers that it wraps are cut too, and tensors outside of states that belong to a parameter
    (:mod:`~lightning_prune.surgery.optimizer_buffers`).

    Entries that have the parameter's shape are cut, so are the row and column factors of Adafactor; numbers are kept.
    An entry whose shape differs from the parameter's, for any parameter, cannot be cut safely: the state of all
    parameters that have this entry is reset, with a warning. The state of L-BFGS is always reset, because its history
    covers all parameters together. Parameter groups, their order and their options are not changed, so learning rate
    schedulers keep working.

    Args:
        optimizer: its ``state`` is changed in place.
        cut_parameters: name -> a parameter that was already cut; ignored if the optimizer has no state of it.

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.grad = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        >>> optimizer.step()
        >>> before, weight.data = weight.shape, weight.data[[0, 2]]
        >>> cut_state_(optimizer, {"weight": CutParameter(weight, before, {0: [0, 2]})})
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([[1., 1.],
                [3., 3.]])
    """
    shapes = {part.parameter: part.shape_before for part in cut_parameters.values()}
    parts = {id(part.parameter): part for part in cut_parameters.values()}
    buffers = buffers_of(optimizer, shapes)
    for each in base_optimizers(optimizer):
        if isinstance(each, LBFGS):
            _reset_lbfgs_(each, cut_parameters.values())
        else:
            _cut_own_state_(each, cut_parameters)
    for tensor, owner in buffers.owned:
        if (part := parts.get(id(owner))) is not None:
            set_data(tensor, cut(tensor, part.dims))


def drop_state_(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Remove parameters that have vanished from an optimizer: from its groups, and with their state.

    The lists of the groups stay the same objects, and their order and options as they are, so learning rate
    schedulers keep working; an optimizer that is built anew from what remains has the same groups.

    Example:
        >>> gone, stays = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([gone, stays], lr=0.1, momentum=0.9)
        >>> drop_state_(optimizer, [gone])
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [1]
    """
    gone = {id(parameter) for parameter in parameters}
    for each in (optimizer, *base_optimizers(optimizer)):
        if isinstance(each, LBFGS):
            _reset_lbfgs_(each, [CutParameter(p, p.shape, {}) for p in parameters])
        for parameter in [p for p in each.state if id(p) in gone]:
            del each.state[parameter]
        for group in each.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]


def check_buffers(optimizer: Optimizer) -> None:
    """Raise ValueError if an optimizer keeps tensors outside of its state that cannot be cut."""
    if opaque := buffers_of(optimizer).opaque:
        raise ValueError(
            f"{type(optimizer).__name__} keeps tensors with the shapes of parameters outside of its state, and "
            f"nothing says which parameters they belong to: {', '.join(opaque[:MAX_NAMES])}. Build the optimizer "
            "anew after the cut instead of passing it, or keep such tensors in optimizer.state"
        )


def _cut_own_state_(optimizer: Optimizer, cut_parameters: Mapping[str, CutParameter]) -> None:
    stateful = {name: part for name, part in cut_parameters.items() if optimizer.state.get(part.parameter)}
    uncuttable = _uncuttable_entries(optimizer, stateful.values())
    reset = [name for name, part in stateful.items() if uncuttable & set(optimizer.state[part.parameter])]
    if reset:
        _warn_of_reset(optimizer, reset, sorted(map(str, uncuttable)))
    for name, part in stateful.items():
        state = optimizer.state.pop(part.parameter)
        if name not in reset:
            optimizer.state[part.parameter] = {key: _cut_entry(key, x, part) for key, x in state.items()}


def _reset_lbfgs_(optimizer: LBFGS, cut_parameters: Iterable[CutParameter]) -> None:
    """Clear the state of L-BFGS, which keeps flat vectors over all parameters, if it has one of the parameters."""
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(part.parameter) in parameters for part in cut_parameters):
        optimizer._numel_cache = None
        if optimizer.state:
            _warn_of_reset(optimizer, [], ["its history of all parameters"])
            optimizer.state.clear()


def _uncuttable_entries(optimizer: Optimizer, cut_parameters: Iterable[CutParameter]) -> set[Any]:
    """Keys of state entries whose dimensions are not those of the parameter, for at least one parameter."""
    # All parameters are looked at, not only those that were cut: the (n, n) preconditioner of an (n, n) weight has
    # the shape of a momentum, and only the preconditioner of an (n, m) weight shows the difference.
    parts = {part.parameter: part for part in cut_parameters}
    all_parts = (
        parts.get(p) or CutParameter(p, p.shape, {}) for p in optimizer.state if isinstance(p, Tensor)
    )
    return {
        key
        for part in all_parts
        for key, value in optimizer.state[part.parameter].items()
        if not _is_plain(value) and _entry_dims(key, value, part) is None
    }


def _is_plain(value: Any) -> bool:
    """Whether an entry has no dimensions to cut: a number, a flag, a count of steps."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    return _is_tensor(value) and value.numel() == 1


def _is_tensor(value: Any) -> bool:
    """Whether it is an ordinary tensor; subclasses (quantised, distributed) may have data besides the visible one."""
    return type(value) in (Tensor, nn.Parameter)


def _entry_dims(key: Any, value: Any, part: CutParameter) -> dict[int, list[int]] | None:
    """Surviving indices of each dimension of a state entry; None if its dimensions are not the parameter's."""
    shape = list(part.shape_before)
    mean_dim = MEAN_DIMS[key] % len(shape) if key in MEAN_DIMS and len(shape) > 1 else None
    if mean_dim is not None:
        shape[mean_dim] = 1
    has_shape = _is_tensor(value) and list(value.shape) == shape
    return {dim: kept for dim, kept in part.dims.items() if dim != mean_dim} if has_shape else None


def _cut_entry(key: Any, value: Any, part: CutParameter) -> Any:
    dims = None if _is_plain(value) else _entry_dims(key, value, part)
    return cut(value, dims) if dims else value


def _warn_of_reset(optimizer: Optimizer, names: list[str], entries: list[str]) -> None:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    parameters = f" of {', '.join(map(repr, names[:MAX_NAMES]))}{more}" if names else ""
    warnings.warn(
        f"{type(optimizer).__name__} state{parameters} is reset: {', '.join(entries)} cannot be cut",
        stacklevel=5,
    )
