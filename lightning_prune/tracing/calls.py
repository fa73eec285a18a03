"""The record of one forward: its operators in order, each with the module and the Python call it came from."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from lightning_prune.tracing.size_reads import SizeReads
from lightning_prune.tracing.traced_int import SizeEvents

__all__ = ["ModuleCall", "OperatorCall", "PythonCall", "Recording", "operator_tensors", "tensors_in"]


@dataclasses.dataclass(eq=False, slots=True)
class PythonCall:
    """A call of torch's Python API, with the arguments that the user's code passed."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the function: ``"view"`` for ``Tensor.view``."""
        return getattr(self.function, "__name__", "")


@dataclasses.dataclass(eq=False)
class OperatorCall:
    """One call of an ATen operator: arguments, result, and its origin in the network.

    Attributes:
        op: the overload, such as ``aten.add.Tensor``.
        args: positional arguments.
        kwargs: keyword arguments.
        out: the result.
        module: name of the innermost running module; "" for the network itself.
        python: the Python-level call that led to this operator.
        line: place in the user's code, ``"net.py:12"``; "" if it is not known.
    """

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    python: PythonCall | None
    line: str

    def arg(self, name: str, default: Any = None) -> Any:
        """Return the argument of that name in the operator's schema, or its default value."""
        for position, argument in enumerate(self.op._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value if default is None else default)
        return default

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also those inside lists."""
        return operator_tensors((*self.args, *self.kwargs.values()))

    @cached_property
    def outputs(self) -> list[Tensor]:
        """All tensors among the results."""
        return operator_tensors(self.out if isinstance(self.out, (list, tuple)) else (self.out,))

    @cached_property
    def place(self) -> tuple[str, str, str]:
        """Module, line and name of the Python-level call."""
        return (self.module, self.line, self.python.name if self.python else "")

    @cached_property
    def description(self) -> str:
        """Operator and place, for messages."""
        place = f" in {self.module}" if self.module else ""
        return f"{self.op.name()}{place}{f', {self.line}' if self.line else ''}"

    def __str__(self) -> str:
        return self.description


@dataclasses.dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of a module's forward.

    Attributes:
        name: qualified name of the module.
        start: number of operators before the call.
        args: positional arguments.
        end: number of operators before its end.
        out: the result; None if the forward raised.
    """

    name: str
    start: int
    args: Any
    end: int = 0
    out: Any = None


@dataclasses.dataclass(eq=False)
class Recording:
    """All operators of one forward, and the tensors that left the network.

    Attributes:
        calls: the operators, in order.
        outputs: tensors in the network's output.
        training: whether the forward ran in train mode.
        real: whether it ran on real values, not on meta or fake tensors.
        size_events: traced sizes that were converted to floats or plain ints.
        numpy_tensors: tensors that were converted to numpy or DLPack, where the trace ends.
        entered: names of the modules that ran.
        module_calls: calls of modules, in the order of their beginning.
        reads: sizes that the network's code has read.
        reason: why it ran on real values; "" if it did not.
        modes_alike: whether it ran in eval mode and would do the same in train mode, apart from operators that treat
            channels alike in both.
    """

    calls: list[OperatorCall]
    outputs: list[Tensor]
    training: bool
    real: bool
    size_events: SizeEvents
    numpy_tensors: list[Tensor]
    entered: set[str]
    module_calls: list[ModuleCall]
    reads: SizeReads
    reason: str = ""
    modes_alike: bool = False


def operator_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results, which are plain values or lists of them."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += operator_tensors(value)
    return tensors


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested collections, such as lists and dictionaries, and in objects such as dataclasses.

    Caches of keys and values are left out: only the network that returned one reads it, so its sizes may change.

    Example:
        >>> import torch
        >>> len(tensors_in({"out": torch.zeros(1), "aux": [torch.zeros(2), None]}))
        2
    """
    tensors: list[Tensor] = []
    for leaf in tree_leaves(value, is_leaf=_is_cache):
        tensors += [leaf] if isinstance(leaf, Tensor) else _tensors_of(leaf)
    return tensors


def _is_cache(value: Any) -> bool:
    """Return whether this is a cache of Transformers, which a network returns to get it back with the next token."""
    kinds = type(value).__mro__
    return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in kinds)


def _tensors_of(leaf: Any) -> list[Tensor]:
    """Return the tensors of an object that pytree takes for a leaf: its items and attributes."""
    if isinstance(leaf, (type, nn.Module)) or callable(leaf) or _is_cache(leaf):
        return []
    items = leaf.values() if isinstance(leaf, Mapping) else leaf
    parts = list(items) if isinstance(leaf, (Mapping, Set, list, tuple, deque)) else []
    parts += getattr(leaf, "__dict__", {}).values()
    parts += (getattr(leaf, name, None) for kind in type(leaf).__mro__ for name in _slots(kind))
    # Some dictionaries have their entries as attributes, too.
    return list({id(tensor): tensor for tensor in tensors_in(parts)}.values())


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
