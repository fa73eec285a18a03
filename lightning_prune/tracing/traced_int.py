"""Whole numbers that remember where they came from (level 0).

``x.view(b, 3, self.num_heads, -1)``: a size held in a Python attribute does not shrink by itself. During a
trace the integer attributes of modules, and the sizes of tensors, are :class:`TracedInt`: ordinary ints that
carry an expression over their origins, through arithmetic, to the call that uses them.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = [
    "Attribute",
    "Leaf",
    "TensorSize",
    "TracedInt",
    "evaluate",
    "leaves",
    "listening",
    "trace_attributes",
    "write",
]


def solve(size: Size, wanted: int, values: dict[Any, int]) -> dict[Any, int] | None:
    """Add a value for one attribute such that ``size`` becomes ``wanted``; None if there is no such value.

    Sizes of tensors (in ``values``) shrink by themselves; an attribute is set only if that is not enough.
    """
    if size is None or size < 0 or _value(size, values) == wanted:
        return values
    for attribute in [leaf for leaf in leaves(size) if isinstance(leaf, Attribute)]:
        for value in _guesses(attribute.value, wanted, int(size)):
            if _value(size, {**values, attribute.key: value}) == wanted:
                return {**values, attribute.key: value}
    return None


def _value(size: int, values: dict[Any, int]) -> int | None:
    try:
        return evaluate(size, values)
    except ZeroDivisionError:
        return None


def _guesses(value: int, wanted: int, size: int) -> Iterator[int]:
    """Proportional first, then all smaller ones."""
    yield value * wanted // max(size, 1)
    yield from range(value, 0, -1)


Size = int | None


@dataclass(frozen=True, eq=False)
class Attribute:
    """An integer attribute of a module, or one item of a tuple or list of them."""

    owner: nn.Module
    name: str
    item: int | None
    value: int

    @property
    def key(self) -> tuple[int, str, int | None]:
        """Equal for two readings of the same attribute."""
        return (id(self.owner), self.name, self.item)

    def __str__(self) -> str:
        return self.name if self.item is None else f"{self.name}[{self.item}]"


@dataclass(frozen=True, eq=False)
class TensorSize:
    """The size of a tensor along one dimension."""

    tensor: torch.Tensor
    dim: int
    value: int

    @property
    def key(self) -> tuple[int, int]:
        """Equal for two readings of the same size."""
        return (id(self.tensor), self.dim)

    def __str__(self) -> str:
        return f"shape[{self.dim}]"


Leaf = Attribute | TensorSize


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """An operator applied to two expressions."""

    operator: Callable[[int, int], int]
    left: Expression
    right: Expression


Expression = Leaf | Arithmetic | int


_PLAIN = int.__int__  # without a word to the listener


@dataclass(eq=False)
class SizeEvents:
    """What became of traced ints while a recording ran."""

    floats: list[TracedInt] = field(default_factory=list)  # their values enter the arithmetic
    numbers: list[TracedInt] = field(default_factory=list)  # they look like constants of the code


_LISTENERS: list[SizeEvents] = []


@contextlib.contextmanager
def listening() -> Iterator[SizeEvents]:
    """Remember the traced ints that are turned into floats or plain numbers within the block."""
    _LISTENERS.append(SizeEvents())
    try:
        yield _LISTENERS[-1]
    finally:
        _LISTENERS.pop()


class TracedInt(int):
    """An int that remembers the expression it was computed from.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> n = TracedInt(12, Attribute(layer, "width", None, 12))
        >>> half = n // 2
        >>> half, evaluate(half, {leaf.key: 8 for leaf in leaves(half)})
        (6, 4)
    """

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> TracedInt:
        """An int of ``value`` that was computed by ``expression``."""
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (_PLAIN(self),))  # copies and pickles are plain

    def __int__(self) -> int:
        """A plain number, which from here on looks like a constant of the code."""
        for listener in _LISTENERS[-1:]:
            listener.numbers.append(self)
        return _PLAIN(self)


def expression_of(size: int) -> Expression:
    """The expression of a traced int; a plain int is its own."""
    return size.expression if isinstance(size, TracedInt) else size


def _binary(function: Callable[[int, int], int], reflected: bool) -> Callable[[TracedInt, Any], Any]:
    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        result = function(_PLAIN(left), _PLAIN(right))
        return TracedInt(result, Arithmetic(function, expression_of(left), expression_of(right)))

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _binary(getattr(operator, _name), reflected=False))
    setattr(TracedInt, f"__r{_name}__", _binary(getattr(operator, _name), reflected=True))
setattr(TracedInt, "__neg__", lambda self: 0 - self)  # noqa: B010  (mypy refuses the plain assignment)


def _escaping(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: TracedInt, *args: Any) -> Any:
        for listener in _LISTENERS[-1:]:
            listener.floats.append(self)
        return plain(_PLAIN(self), *args)

    return method


for _name in ("float", "truediv", "rtruediv", "pow", "rpow"):
    setattr(TracedInt, f"__{_name}__", _escaping(f"__{_name}__"))


def leaves(size: int) -> Iterator[Leaf]:
    """The attributes and tensor sizes that a number was computed from."""
    stack = [expression_of(size)]
    while stack:
        node = stack.pop()
        if isinstance(node, Arithmetic):
            stack += [node.left, node.right]
        elif not isinstance(node, int):
            yield node


def evaluate(size: int, values: Mapping[Any, int]) -> int:
    """Compute ``size`` again with other values for some of its leaves, by their keys."""

    def value(node: Expression) -> int:
        if isinstance(node, Arithmetic):
            return node.operator(value(node.left), value(node.right))
        return node if isinstance(node, int) else values.get(node.key, node.value)

    return value(expression_of(size))


def _traced(owner: nn.Module, name: str, held: Any) -> Any:
    """``held`` with every int replaced by a traced one; None where there is none."""
    if type(held) is int:
        return TracedInt(held, Attribute(owner, name, None, held))
    if type(held) in (tuple, list) and held and all(type(item) is int for item in held):
        items = [TracedInt(item, Attribute(owner, name, i, item)) for i, item in enumerate(held)]
        return type(held)(items)
    return None


def trace_attributes(model: nn.Module) -> None:
    """Replace every integer attribute of the model's modules by a traced one. The caller restores them."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, held in list(vars(module).items()):
            if (traced := _traced(module, name, held)) is not None:
                vars(module)[name] = traced


def write(attribute: Attribute, value: int) -> None:
    """Set the attribute. Tuples and lists are replaced, not changed, since others may hold them."""
    if attribute.item is not None:
        held = getattr(attribute.owner, attribute.name)
        items = list(held)
        items[attribute.item] = value
        setattr(attribute.owner, attribute.name, type(held)(items))
    else:
        setattr(attribute.owner, attribute.name, value)
