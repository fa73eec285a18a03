"""Keep the sizes of a trace out of the caches of functions.

A function under ``functools.lru_cache`` returns for equal arguments what it returned before. A traced int equals the
plain int of an earlier forward, of another module or of another trace: what such a function returns would then be a
constant, or a size of another module. For the time of a trace these functions are called without their caches
wherever an argument carries traced sizes. (einops reshapes by such functions.)
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.tracing.traced_int import TracedInt

__all__ = ["caches_bypassed"]

_CachedFunction = type(functools.lru_cache(lambda: None))
#: Libraries whose caches never see sizes of a network; scanning them would take longer than a trace.
_SCANNED_NEVER = {*sys.stdlib_module_names, "torch", "numpy", "scipy", "lightning", "pytest", "_pytest"}
#: name of a Python module -> number of its attributes when it was scanned, and what was found
_SCANNED: dict[str, tuple[int, list[tuple[Any, str, Any]]]] = {}


@contextlib.contextmanager
def caches_bypassed(model: nn.Module) -> Iterator[None]:
    """Call cached functions without their caches, within the block, if their arguments carry traced sizes."""
    owners = [*_cached_in_libraries(), *_cached_in_attributes(model)]
    for owner, name, function in owners:
        _set(owner, name, _bypass(function))
    try:
        yield
    finally:
        for owner, name, function in owners:
            _set(owner, name, function)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        vars(owner)[name] = value


def _bypass(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        carries_sizes = any(
            isinstance(leaf, (TracedInt, Tensor, nn.Module)) for leaf in tree_leaves((args, kwargs))
        )
        return (function.__wrapped__ if carries_sizes else function)(*args, **kwargs)

    for name in ("cache_info", "cache_clear", "cache_parameters"):
        setattr(call, name, getattr(function, name))
    return call


def _cached_in_attributes(model: nn.Module) -> list[tuple[Any, str, Any]]:
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, _CachedFunction)
    ]


def _cached_in_libraries() -> Iterator[tuple[Any, str, Any]]:
    """Yield namespace, name and function of every cached function of the loaded modules, and of their classes."""
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or name.partition(".")[0] in _SCANNED_NEVER:
            continue
        count, found = _SCANNED.get(name, (-1, []))
        if count != len(vars(module)):
            found = list(_cached_in(module, name))
            _SCANNED[name] = len(vars(module)), found
        # A name may have been bound anew since then.
        yield from (entry for entry in found if vars(entry[0]).get(entry[1]) is entry[2])


def _cached_in(module: ModuleType, name: str) -> Iterator[tuple[Any, str, Any]]:
    for attribute, value in list(vars(module).items()):
        if isinstance(value, _CachedFunction):
            yield module, attribute, value
        elif isinstance(value, type) and value.__module__ == name:
            for method, function in list(vars(value).items()):
                if isinstance(function, _CachedFunction):
                    yield value, method, function
