"""The sizes of an ATen operator as the user's Python code passed them (level 1).

ATen sees ``view(x, [1, 3, 4, 16])``; Python said ``x.view(1, 3, self.num_heads, -1)``. Each size is one of:
a :class:`~lightning_prune.tracing.traced_int.TracedInt`, a plain int (a constant in the code), -1 (free), or None where
the call was made inside torch and the size follows the tensors by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.traced_int import Size, TensorSize, TracedInt

__all__ = ["Size", "argument", "bounds", "sizes"]

_SHAPING = ("view", "reshape", "expand", "unflatten", "broadcast_to", "_unsafe_view", "repeat", "tile")
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sequences(args: Sequence[Any]) -> Iterator[list[int]]:
    """Every list of ints among the arguments, and the ints passed one by one."""
    for value in args:
        if isinstance(value, (tuple, list)) and value and all(_is_int(item) for item in value):
            yield list(value)
    loose = [value for value in args if _is_int(value)]
    if loose:
        yield loose


def sizes(call: OperatorCall, concrete: Sequence[int]) -> list[Size]:
    """The sizes passed for ``concrete``, the ones that ATen received; None each where none was passed."""
    unknown: list[Size] = [None] * len(concrete)
    if call.python is not None and call.python.name in ("expand_as", "view_as", "reshape_as"):
        other = call.python.args[1]
        return [TracedInt(size, TensorSize(other, dim, size)) for dim, size in enumerate(tuple(other.shape))]
    if call.python is None or call.python.name not in _SHAPING + _FACTORIES:
        return unknown
    values = [*call.python.args, *call.python.kwargs.values()]
    if call.python.name == "unflatten":
        return _unflattened(call, concrete, unknown)
    for passed in _sequences(values):
        if len(passed) == len(concrete) and all(p in (c, -1) for p, c in zip(passed, concrete, strict=True)):
            return list(passed)
    return unknown


def _unflattened(call: OperatorCall, concrete: Sequence[int], unknown: list[Size]) -> list[Size]:
    assert call.python is not None
    args, kwargs = call.python.args, call.python.kwargs
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    passed = list(kwargs.get("sizes", args[2] if len(args) > 2 else ()))
    dim %= len(concrete) - len(passed) + 1
    return [*unknown[:dim], *passed, *unknown[dim + len(passed) :]]


def argument(call: OperatorCall, position: int, name: str) -> Any:
    """An argument of the Python-level call, by position or name; None if it was not passed."""
    if call.python is None:
        return None
    args = call.python.args
    return args[position] if position < len(args) else call.python.kwargs.get(name)


def bounds(call: OperatorCall, start: int, end: int) -> tuple[Size, Size]:
    """Start and end of a slice as the code passed them (``x[:, a:b]``, ``narrow``)."""
    if call.python is not None and call.python.name == "narrow":
        first, length = argument(call, 2, "start"), argument(call, 3, "length")
        return first, first + length
    index = argument(call, 1, "index")
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice) and _same(item.start, start, 0) and _same(item.stop, end, 2**63 - 1):
            return item.start, item.stop
    return start, end


def _same(passed: Any, concrete: int, default: int) -> bool:
    return (default if passed is None else passed) == concrete
