"""Sizes of an ATen operator, as the Python code of the network passed them.

ATen receives ``view(x, [1, 3, 4, 16])`` where Python called ``x.view(1, 3, self.num_heads, -1)``. A passed size is
one of:

- a :class:`~lightning_prune.tracing.traced_int.TracedInt`: computed from attributes of modules or sizes of tensors;
- a plain int: a constant in the code;
- -1: inferred by torch;
- None: the call was made inside torch, and the size follows the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.traced_int import Attribute, PassedSize, TensorSize, TracedInt, leaves
from lightning_prune.tracing.tracker import Tracker

__all__ = ["OPEN_END", "labels_from_sizes", "passed_argument", "passed_bounds", "passed_sizes"]

_RESHAPING = ("view", "reshape", "expand", "unflatten", "broadcast_to", "_unsafe_view", "repeat", "tile")
_FACTORIES = (
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
)  # fmt: skip
OPEN_END = 2**63 - 1  # what ATen receives as the end of ``x[:, a:]``


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int_lists(args: Sequence[Any]) -> Iterator[list[int]]:
    """Yield every list of ints among the arguments, then the ints passed one by one."""
    for value in args:
        if isinstance(value, (tuple, list)) and value and all(_is_int(item) for item in value):
            yield list(value)
    separate = [value for value in args if _is_int(value)]
    if separate:
        yield separate


def passed_sizes(call: OperatorCall, concrete: Sequence[int]) -> list[PassedSize]:
    """Return the passed size for each of the sizes ``concrete`` that ATen received; None where there is none."""
    unknown: list[PassedSize] = [None] * len(concrete)
    if call.python is not None and call.python.name in ("expand_as", "view_as", "reshape_as"):
        other = call.python.args[1]
        return [TracedInt(size, TensorSize(other, dim, size)) for dim, size in enumerate(tuple(other.shape))]
    if call.python is None or call.python.name not in _RESHAPING + _FACTORIES:
        return unknown
    if call.python.name == "unflatten":
        return _unflatten_sizes(call, concrete, unknown)
    for passed in _int_lists([*call.python.args, *call.python.kwargs.values()]):
        if len(passed) == len(concrete) and all(p in (c, -1) for p, c in zip(passed, concrete, strict=True)):
            return list(passed)
    return unknown


def _unflatten_sizes(
    call: OperatorCall, concrete: Sequence[int], unknown: list[PassedSize]
) -> list[PassedSize]:
    """Return the sizes passed to ``unflatten``, which cover only the dimensions that it makes."""
    assert call.python is not None
    args, kwargs = call.python.args, call.python.kwargs
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    passed = list(kwargs.get("sizes", args[2] if len(args) > 2 else ()))
    dim %= len(concrete) - len(passed) + 1
    return [*unknown[:dim], *passed, *unknown[dim + len(passed) :]]


def passed_argument(call: OperatorCall, position: int, name: str) -> Any:
    """Return an argument of the Python call, by position or name; None if it was not passed."""
    if call.python is None:
        return None
    args = call.python.args
    return args[position] if position < len(args) else call.python.kwargs.get(name)


def passed_bounds(call: OperatorCall, start: int, end: int) -> tuple[PassedSize, PassedSize]:
    """Return start and end of a slice (``x[:, a:b]``, ``narrow``) as passed; by default as ATen received them."""
    if call.python is not None and call.python.name == "narrow":
        first, length = passed_argument(call, 2, "start"), passed_argument(call, 3, "length")
        return first, first + length
    index = passed_argument(call, 1, "index")
    for item in index if isinstance(index, tuple) else (index,):
        if (
            isinstance(item, slice)
            and _is_bound(item.start, start, 0)
            and _is_bound(item.stop, end, OPEN_END)
        ):
            return item.start, item.stop
    return start, end


def _is_bound(passed: Any, concrete: int, default: int) -> bool:
    return (default if passed is None else passed) == concrete


def labels_from_sizes(passed: Sequence[PassedSize], tracker: Tracker) -> list[tuple[Ids, ...]]:
    """Return labels of dimensions created from sizes.

    A size read from a tensor gives the ids along the dimension that was read; a size computed from attributes gives
    new ids, which set the attributes.
    """
    labels: list[tuple[Ids, ...]] = []
    for size in passed:
        tracker.register_size(size)
        origin = size.expression if isinstance(size, TracedInt) else None
        ids = tracker.sizes.get(origin.key) if isinstance(origin, TensorSize) else None
        if isinstance(size, TracedInt) and any(isinstance(leaf, Attribute) for leaf in leaves(size)):
            ids = tracker.ties.fresh(int(size))
            tracker.require_size(size, ids)
        labels.append((ids,) if ids is not None and len(ids) == size else ())
    return labels
