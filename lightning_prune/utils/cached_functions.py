"""Find functions under ``functools.lru_cache``, and replace them where they are kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

__all__ = ["FUNCTIONS", "CachedPlace", "cached_at"]

_CachedFunction = type(functools.lru_cache(lambda: None))
_METHODS = (staticmethod, classmethod)
#: Types of the values in which :func:`cached_at` may find something; most attributes have others.
FUNCTIONS = (*_METHODS, _CachedFunction, FunctionType)


@dataclass(frozen=True)
class CachedPlace:
    """A place that keeps a cached function: an attribute, or a variable that a decorator closed over.

    Attributes:
        owner: a module, class, or cell of a closure.
        name: of the attribute; "" in a cell.
        value: what is kept there: the function, or a static or class method of it.
        function: the cached function.
    """

    owner: Any
    name: str
    value: Any
    function: Any

    @property
    def is_current(self) -> bool:
        """Whether the function is still there; a name may have been bound anew since it was found."""
        return _read(self.owner, self.name) is self.value

    def put(self, function: Any) -> None:
        """Keep another function there, as the same kind of method."""
        wrap = type(self.value) if isinstance(self.value, _METHODS) else None
        _write(self.owner, self.name, function if wrap is None else wrap(function))

    def restore(self) -> None:
        """Keep again what was there."""
        _write(self.owner, self.name, self.value)


def cached_at(owner: Any, name: str, value: Any) -> Iterator[CachedPlace]:
    """Yield the place of the cached function that an attribute is, wraps as a method, or calls in a decorator.

    Example:
        >>> class Halves:
        ...     @staticmethod
        ...     @functools.lru_cache
        ...     def of(number):
        ...         return number // 2
        >>> [place.function is Halves.of for place in cached_at(Halves, "of", vars(Halves)["of"])]
        [True]
    """
    function = value.__func__ if isinstance(value, _METHODS) else value
    if isinstance(function, _CachedFunction):
        yield CachedPlace(owner, name, value, function)
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            content = _read(cell, "")
            if isinstance(content, _CachedFunction):
                yield CachedPlace(cell, "", content, content)


def _read(owner: Any, name: str) -> Any:
    if isinstance(owner, CellType):
        try:
            return owner.cell_contents
        except ValueError:  # an empty cell
            return None
    return vars(owner).get(name)


def _write(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, CellType):
        owner.cell_contents = value
    elif isinstance(owner, type):
        setattr(owner, name, value)
    else:
        vars(owner)[name] = value
