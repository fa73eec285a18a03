"""Find code of a network that may read sizes where :mod:`~lightning_prune.tracing.size_reads` does not see it.

Such are TorchScript functions, and code that looks into the dictionaries of objects, or takes torch's modes away. It
is looked for in the files that define the network's classes, and in what their methods, and the functions that its
modules hold, call by name in other files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from lightning_prune.tracing.size_reads import GUARDED
from lightning_prune.utils.module_walk import modules_of

__all__ = ["hides_reads"]

#: Names by which code reads attributes past the properties, or runs code that nothing sees.
_HIDING = frozenset(
    (
        *("vars", "__dict__", "__getattribute__", "extra_repr", "f_locals"),
        *("DisableTorchFunction", "_disable_current_modes"),
    )
)
#: Methods that no forward runs.
_ASIDE = frozenset(
    (
        *("__repr__", "extra_repr", "__getstate__", "__setstate__", "__reduce__", "__init_subclass__"),
        *("__init__", "__new__"),
    )
)
#: Packages whose code no forward runs, or is known.
_KNOWN = frozenset(("torch", "abc", "typing", "collections", "huggingface_hub"))
_NEVER_FOLLOWED = frozenset((*_KNOWN, *sys.stdlib_module_names, "numpy", "lightning_prune"))


def hides_reads(model: nn.Module) -> bool:
    """Return whether a network has code that may read sizes unseen.

    Example:
        >>> hides_reads(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        False
    """
    modules = modules_of(model)
    return any(map(_class_hides, {type(module) for module in modules})) or any(
        _reaches_hiding(function) for module in modules for function in _held(vars(module).values())
    )


def _class_hides(kind: type) -> bool:
    return (
        issubclass(kind, torch.jit.ScriptModule)
        or any(map(_file_hides, _files_of(kind)))  # type: ignore[arg-type]
        or _methods_hide(kind)  # type: ignore[arg-type]
    )


@lru_cache(maxsize=1024)
def _files_of(kind: type) -> frozenset[str]:
    """Return the names of the Python modules that define a class and its bases, without those that are known."""
    names = {base.__module__ for base in kind.__mro__ if base is not object}
    return frozenset(name for name in names if name.partition(".")[0] not in _KNOWN)


def _file_hides(name: str) -> bool:
    file = sys.modules.get(name)
    return file is None or _scan(file, len(vars(file)))


@lru_cache(maxsize=1024)
def _scan(file: ModuleType, number_of_names: int) -> bool:
    for value in list(vars(file).values()):
        if isinstance(value, torch.jit.ScriptFunction):
            return True
        if (
            isinstance(value, FunctionType)
            and not value.__module__.startswith("torch.")
            and _hides(value.__code__)
        ):
            return True
        own = isinstance(value, type) and value.__module__ == file.__name__
        if own and any(_hides(function.__code__) for function in _functions_of(value)):
            return True
    return False


def _hides(code: CodeType) -> bool:
    return code.co_name not in _SILENT and not _HIDING.isdisjoint(_names(code))


_SILENT = _ASIDE - {"__init__", "__new__"}


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """Return all names that code uses, also as texts for ``getattr``, and in the functions within it."""
    texts = [text for text in code.co_consts if isinstance(text, str) and text in _HIDING]
    within = [_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)]
    return frozenset(code.co_names).union(texts, *within)


# -- what a network's methods and functions call -----------------------------------------------------------


@lru_cache(maxsize=1024)
def _methods_hide(kind: type) -> bool:
    """Whether methods of a class call code that hides reads, or its attributes take the place of those of modules."""
    own = [base for base in kind.__mro__ if base is not object and not _is_known(base.__module__)]
    if any(not isinstance(vars(base).get(name, _GETTER), property) for base in own for name in GUARDED):
        return True
    return any(
        _reaches_hiding(function)
        for base in own
        for function in _functions_of(base)
        if function.__code__.co_name not in _ASIDE
    )


_GETTER = property()


@lru_cache(maxsize=4096)
def _reaches_hiding(function: FunctionType) -> bool:
    """Whether a function, or one that it calls by name, hides reads."""
    found, left = {function}, [function]
    while left:
        present = left.pop()
        if _hides(present.__code__):
            return True
        new = set(_held(_named_by(present))) - found
        found |= new
        left += new
    return False


def _named_by(function: FunctionType) -> Iterator[Any]:
    """Yield the objects that the names in a function stand for: in its file, and in those that it has imported."""
    names, values = _names(function.__code__), function.__globals__
    yield vars(function).get("__wrapped__")
    yield from [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
    for value in [values[name] for name in names if name in values]:
        if isinstance(value, ModuleType) and not _is_known(value.__name__):
            yield from [vars(value)[name] for name in names if name in vars(value)]
        else:
            yield value


_EMPTY = type((lambda x: lambda: x)(0).__closure__[0])()  # type: ignore[index]


def _held(values: Iterable[Any]) -> Iterator[FunctionType]:
    """Yield the functions among some objects, and the methods of their classes that are no modules."""
    for value in values:
        kind = type(value)
        if kind is partial:
            yield from _held([value.func])
        elif kind is MethodType:
            yield from _held([value.__func__])
        elif kind is FunctionType:
            if not _is_known(value.__module__ or "") or "__wrapped__" in vars(value):
                yield value
        elif kind is type and not issubclass(value, nn.Module) and not _is_known(value.__module__):
            yield from _functions_of(value)


def _functions_of(kind: type) -> Iterator[FunctionType]:
    for member in list(vars(kind).values()):
        for part in (member, getattr(member, "__func__", None), getattr(member, "fget", None)):
            if isinstance(part, FunctionType):
                yield part


def _is_known(name: str) -> bool:
    return name.partition(".")[0] in _NEVER_FOLLOWED
