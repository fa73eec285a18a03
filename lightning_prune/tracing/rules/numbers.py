"""Sizes that become numbers: ``torch.tensor(x.shape[1])``, ``torch.full((1,), c)``, ``x / c``, ``torch.arange(c)``.

Removing channels changes such a number, and with it whatever it scales: a cut is sound, but the other channels do
not keep their values, as under a norm over channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.traced_int import TracedInt
from lightning_prune.tracing.tracker import Tracker

__all__ = ["mark_sized_numbers", "pass_constants_on", "scalars"]

aten = torch.ops.aten
#: Operators that only move values.
_MOVEMENTS = {
    aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default, aten.expand.default,
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip

#: Python calls that make tensors of numbers, which no operator receives as arguments, or whose values are sizes.
_CONSTRUCTORS = (
    "tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor",
    "eye", "randperm", "tril_indices", "triu_indices",
)  # fmt: skip
#: Types in schemas; ``x / 4.0`` passes the number in the place of a tensor.
_NUMBER_TYPES = ("number", "float", "Tensor")


def mark_sized_numbers(call: OperatorCall, tracker: Tracker) -> None:
    """Mark the channels whose number the code passes to an operator as a number, not as a size."""
    if call.python is None:
        return
    constructs = call.python.name in _CONSTRUCTORS
    # Arguments are searched only if a number may be a size: not for the eps of a norm.
    numbers = () if constructs else tuple(value for _, value in scalars(call) if value % 1 == 0)
    if not constructs and not numbers:
        return
    for size in tree_leaves((call.python.args, call.python.kwargs)):
        if isinstance(size, TracedInt) and (constructs or size in numbers):
            tracker.mark_float_use(size)


def pass_constants_on(call: OperatorCall, tracker: Tracker) -> None:
    """Note that a moved constant, such as ``torch.ones(c)[None]``, is one."""
    if call.op in _MOVEMENTS and tracker.is_constant(call.args[0]):
        tracker.mark_constant(call.out)


def scalars(call: OperatorCall) -> Iterator[tuple[int | str, Any]]:
    """Yield position or name, and value, of each argument that the operator takes as a number, not as a size."""
    for position, name in _number_arguments(call.op):
        is_positional = position < len(call.args)
        value = call.args[position] if is_positional else call.kwargs.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield position if is_positional else name, value


@cache
def _number_arguments(op: OpOverload) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(op._schema.arguments)
    return tuple((at, argument.name) for at, argument in arguments if _is_number(str(argument.type)))


def _is_number(kind: str) -> bool:
    return kind.removeprefix("Optional[").removesuffix("]") in _NUMBER_TYPES
