"""Integers that remember the expression they were computed from.

``x.view(b, 3, self.num_heads, -1)``: a size that is stored in a Python attribute does not shrink with the weights.
During a trace the integer attributes of modules, and the sizes of tensors, are :class:`TracedInt`: ordinary ints
that carry an expression through arithmetic to the call that uses them. After surgery the expression shows which
attribute must be set, and to which value.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_prune.utils.module_walk import modules_of
from lightning_prune.utils.named_sizes import is_named_sizes, named_path, write_size

__all__ = [
    "Arithmetic",
    "Attribute",
    "Leaf",
    "PassedSize",
    "SizeEvents",
    "TensorSize",
    "TracedInt",
    "evaluate",
    "form_of",
    "leaves",
    "record_size_events",
    "set_attribute",
    "solve",
    "trace_attributes",
    "try_evaluate",
]

#: A size as the user's code passed it; None if it was not passed.
PassedSize = int | None


# -- expressions --------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)  # not frozen: hundreds are made in each trace, three times as fast
class Attribute:
    """An integer attribute of a module, or one item of a tuple or list of integers or of named integers."""

    owner: nn.Module
    name: str
    item: int | str | None
    value: int

    @property
    def key(self) -> tuple[int, str, int | str | None]:
        """Hashable key, equal for two readings of the same attribute."""
        return (id(self.owner), self.name, self.item)

    def __str__(self) -> str:
        return self.name if self.item is None else f"{self.name}[{self.item}]"


@dataclass(slots=True, eq=False)
class TensorSize:
    """The size of a tensor along one dimension."""

    tensor: torch.Tensor
    dim: int
    value: int

    @property
    def key(self) -> tuple[int, int]:
        """Hashable key, equal for two readings of the same size."""
        return (id(self.tensor), self.dim)

    def __str__(self) -> str:
        return f"shape[{self.dim}]"


Leaf = Attribute | TensorSize


@dataclass(slots=True, eq=False)
class Arithmetic:
    """A binary operator applied to two expressions."""

    operator: Callable[[int, int], int]
    left: Expression
    right: Expression


Expression = Leaf | Arithmetic | int


# -- events -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SizeEvents:
    """What happened to traced ints while a forward was recorded, apart from arithmetic."""

    as_floats: list[TracedInt] = field(default_factory=list)  # their values enter the arithmetic on tensors
    as_ints: list[TracedInt] = field(default_factory=list)  # they cannot be told from constants of the code
    equal: list[tuple[TracedInt, TracedInt]] = field(default_factory=list)  # compared by the code


_ACTIVE_EVENTS: list[SizeEvents] = []


@contextlib.contextmanager
def record_size_events() -> Iterator[SizeEvents]:
    """Record the traced ints that are converted to floats or plain ints, or compared, within the block."""
    _ACTIVE_EVENTS.append(SizeEvents())
    try:
        yield _ACTIVE_EVENTS[-1]
    finally:
        _ACTIVE_EVENTS.pop()


# -- the integer --------------------------------------------------------------------------------------------

_to_int = int.__int__  # unlike `int(size)`, records no event


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
        """Create an int of ``value`` that was computed by ``expression``."""
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (_to_int(self),))  # copies and pickles are plain ints

    def __eq__(self, other: object) -> Any:
        """Compare as ints; record two traced ints that are equal."""
        equal = int.__eq__(self, other) if isinstance(other, int) else NotImplemented
        if equal is True and isinstance(other, TracedInt):
            for events in _ACTIVE_EVENTS[-1:]:
                events.equal.append((self, other))
        return equal

    def __ne__(self, other: object) -> Any:
        """Compare as ints; record two traced ints that are equal."""
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __hash__ = int.__hash__

    def __int__(self) -> int:
        """Convert to a plain int, which the trace cannot tell from a constant of the code; record that."""
        for events in _ACTIVE_EVENTS[-1:]:
            events.as_ints.append(self)
        return _to_int(self)


def _expression(size: int) -> Expression:
    """Return the expression of a traced int; a plain int is an expression already."""
    return size.expression if isinstance(size, TracedInt) else size


def _arithmetic_method(
    function: Callable[[int, int], int], reflected: bool
) -> Callable[[TracedInt, Any], Any]:
    """Build a method like ``__add__`` (or ``__radd__`` if ``reflected``) whose result is a traced int."""

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented  # Python then calls the method of the float or tensor
        left, right = (other, self) if reflected else (self, other)
        result = function(_to_int(left), _to_int(right))
        return TracedInt(result, Arithmetic(function, _expression(left), _expression(right)))

    return method


def _float_method(name: str) -> Callable[..., Any]:
    """Build a method whose result is a plain float (``__pow__``: number), and which records that."""
    int_method = getattr(int, name)

    def method(self: TracedInt, *args: Any) -> Any:
        for events in _ACTIVE_EVENTS[-1:]:
            events.as_floats.append(self)
        return int_method(_to_int(self), *args)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _arithmetic_method(getattr(operator, _name), reflected=False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic_method(getattr(operator, _name), reflected=True))
setattr(TracedInt, "__neg__", lambda self: 0 - self)  # noqa: B010  (mypy refuses the plain assignment)
for _name in ("float", "truediv", "rtruediv", "pow", "rpow"):
    setattr(TracedInt, f"__{_name}__", _float_method(f"__{_name}__"))


# -- evaluation ---------------------------------------------------------------------------------------------


def leaves(size: int) -> Iterator[Leaf]:
    """Yield the attributes and tensor sizes that ``size`` was computed from; none for a plain int."""
    stack = [_expression(size)]
    while stack:
        node = stack.pop()
        if isinstance(node, Arithmetic):
            stack += [node.left, node.right]
        elif not isinstance(node, int):
            yield node


def evaluate(size: int, values: Mapping[Any, int]) -> int:
    """Compute ``size`` again, with the new ``values`` of some of its leaves (key of the leaf -> value).

    Raises:
        ZeroDivisionError: the expression divides by a value that is zero now.
    """

    def value(node: Expression) -> int:
        if isinstance(node, Arithmetic):
            return node.operator(value(node.left), value(node.right))
        return node if isinstance(node, int) else values.get(node.key, node.value)

    return value(_expression(size))


def form_of(size: int) -> Hashable:
    """Return a key that is equal for sizes that are computed from the same leaves in the same way."""
    return _form_of(_expression(size))


def _form_of(expression: Expression) -> Hashable:
    if isinstance(expression, Arithmetic):
        return (expression.operator, _form_of(expression.left), _form_of(expression.right))
    return expression if isinstance(expression, int) else expression.key


def try_evaluate(size: int, values: Mapping[Any, int]) -> int | None:
    """Compute ``size`` again like :func:`evaluate`; None if that divides by zero."""
    try:
        return evaluate(size, values)
    except ZeroDivisionError:
        return None


def solve(size: PassedSize, target: int, values: dict[Any, int]) -> dict[Any, int] | None:
    """Extend ``values`` by a value of one attribute such that ``size`` becomes ``target``.

    Sizes of tensors (in ``values``) shrink with their tensors; an attribute is set only if that is not enough.

    Returns:
        The values of leaves, by their keys; None if no value of a single attribute gives ``target``.
    """
    if size is None or size < 0 or try_evaluate(size, values) == target:
        return values
    for attribute in [leaf for leaf in leaves(size) if isinstance(leaf, Attribute)]:
        for value in _candidate_values(attribute.value, target, int(size)):
            solution = {**values, attribute.key: value}
            if try_evaluate(size, solution) == target:
                return solution
    return None


def _candidate_values(value: int, target: int, size: int) -> Iterator[int]:
    """Yield possible new values of an attribute: first the proportional one, then all from ``value`` down to 1."""
    yield value * target // max(size, 1)
    yield from range(value, 0, -1)


# -- attributes of modules ----------------------------------------------------------------------------------


_TRACED = frozenset((int, tuple, list))


def trace_attributes(model: nn.Module) -> None:
    """Replace every integer attribute of the model's modules by a traced int. The caller restores them."""
    for module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        attributes = vars(module)
        for name, value in attributes.items():
            if type(value) in _TRACED and (traced_value := _traced(module, name, value)) is not None:
                attributes[name] = (
                    traced_value  # a new value for a key may be stored while the items are read
                )


def _traced(owner: nn.Module, name: str, value: Any) -> Any:
    """Return the value of an attribute with its int, or all its ints, traced; None if it has another type."""
    if type(value) is int:
        return TracedInt(value, Attribute(owner, name, None, value))
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        items = [TracedInt(item, Attribute(owner, name, i, item)) for i, item in enumerate(value)]
        return type(value)(items)
    if is_named_sizes(value):
        return tuple((key, TracedInt(size, Attribute(owner, name, key, size))) for key, size in value)
    return None


def set_attribute(attribute: Attribute, value: int) -> None:
    """Set the attribute. Tuples and lists are replaced, not changed, since other objects may share them."""
    if isinstance(attribute.item, str):
        write_size(attribute.owner, named_path(attribute.name, attribute.item), value)
    elif attribute.item is not None:
        old_items = getattr(attribute.owner, attribute.name)
        items = list(old_items)
        items[attribute.item] = value
        setattr(attribute.owner, attribute.name, type(old_items)(items))
    else:
        setattr(attribute.owner, attribute.name, value)
