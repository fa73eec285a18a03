"""What one forward of a network was: its operators, in order, with who called them (level 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from lightning_prune.tracing.traced_int import TracedInt

__all__ = ["OperatorCall", "PythonCall", "Recording", "tensors_among", "tensors_in"]


@dataclasses.dataclass(eq=False)
class PythonCall:
    """A call of the Python API, with its arguments as the user's code passed them."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """``"view"`` for ``Tensor.view``."""
        return getattr(self.function, "__name__", "")


@dataclasses.dataclass(eq=False)
class OperatorCall:
    """One ATen operator as it ran: its arguments, its result, and who called it."""

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    python: PythonCall | None
    line: str

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument by its name in the operator's schema."""
        for position, argument in enumerate(self.op._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value if default is None else default)
        return default

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, also inside lists."""
        return tensors_among((*self.args, *self.kwargs.values()))

    @cached_property
    def outputs(self) -> list[Tensor]:
        """Every tensor among the results."""
        return tensors_among(self.out if isinstance(self.out, (list, tuple)) else (self.out,))

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        return f"{self.op.name()}{place}{f', {self.line}' if self.line else ''}"


@dataclasses.dataclass(eq=False)
class Recording:
    """All operators of one forward, in order, and the tensors that left the network."""

    calls: list[OperatorCall]
    outputs: list[Tensor]
    training: bool
    real: bool
    escaped: list[TracedInt]  # sizes whose values entered the arithmetic
    numbers: list[TracedInt]  # sizes that became plain numbers
    left: list[Tensor]  # what went on outside torch, where nobody follows it


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among an operator's arguments or results: flat, or in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_among(value)
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and plain objects such as dataclasses.

    Example:
        >>> import torch
        >>> len(tensors_in({"out": torch.zeros(1), "aux": [torch.zeros(2), None]}))
        2
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf):
            found += tensors_in(dict(vars(leaf)))
    return found
