"""The attributes of a network's modules at one moment, to tell later whether its code has changed what it holds."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_prune.utils.module_walk import modules_of

__all__ = ["ModuleState"]

_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_VALUES = frozenset((int, float, str, tuple, frozenset, bytes, complex))


@dataclass(frozen=True)
class ModuleState:
    """The modules of a network and their attributes, with the content of their containers.

    Attributes:
        modules: each module with a copy of its dictionary.
        contents: each container in these with its items.
    """

    modules: list[tuple[nn.Module, dict[str, Any]]]
    contents: list[tuple[Any, tuple[Any, ...]]]

    @classmethod
    def of(cls, model: nn.Module) -> ModuleState:
        """Return the present state of a network.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
            >>> state = ModuleState.of(net)
            >>> net[1] = nn.Sigmoid()
            >>> state.is_that_of(net), ModuleState.of(net).is_that_of(net)
            (False, True)
        """
        modules = [(module, dict(vars(module))) for module in modules_of(model)]
        contents = [
            (value, _items(value) if value else ())
            for _, attributes in modules
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]
        return cls(modules, contents)

    def is_that_of(self, model: nn.Module, changed: Collection[tuple[int, str]] = ()) -> bool:
        """Return whether a network holds the same, apart from modes and attributes ``(id of the module, name)``."""
        present = modules_of(model)
        if len(present) != len(self.modules):
            return False
        pairs = zip(self.modules, present, strict=True)
        return all(
            module is now and _holds_the_same(module, before, changed) for (module, before), now in pairs
        ) and all(
            _are_same(_items(container), items) if items else not container
            for container, items in self.contents
        )


def _holds_the_same(module: nn.Module, before: dict[str, Any], changed: Collection[tuple[int, str]]) -> bool:
    attributes = vars(module)
    if attributes.keys() != before.keys():
        return False
    if all(map(operator.is_, attributes.values(), before.values())):
        return True
    return all(
        value is before[name]
        or name == "training"
        or (id(module), name) in changed
        or _are_equal(value, before[name])
        for name, value in attributes.items()
    )


def _items(container: Any) -> tuple[Any, ...]:
    if isinstance(container, dict):
        return (*container, *container.values())
    return tuple(container)


def _are_same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether both have the same objects, or equal numbers and texts, in the same order."""
    return len(left) == len(right) and all(
        a is b or _are_equal(a, b) for a, b in zip(left, right, strict=True)
    )


def _are_equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and type(left) in _VALUES and left == right
