"""Networks whose code is all known: only their cuts are proven without running the smaller network.

:mod:`~lightning_prune.tracing.size_reads` sees what common code reads, and code that hides its reads is looked for.
But Python has ever more ways to hide them, and a cut that is wrong must never pass. So code of one's own is always
run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from lightning_prune.utils.module_walk import modules_of

__all__ = ["is_known_code"]

#: Packages with whose networks the proof without a forward is tested, against the whole proof.
PACKAGES = frozenset(("torch", "torchvision", "timm", "segmentation_models_pytorch", "lightning_prune"))
#: Packages of base classes that have no part in a forward.
_BASES = frozenset(
    ("builtins", "abc", "typing", "collections", "huggingface_hub", "lightning", "pytorch_lightning")
)
_GENERATED = (torch.fx.GraphModule, torch.jit.ScriptModule)  # torch's classes with the code of others
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
#: Types of most attributes, which are no functions.
_PLAIN = frozenset((bool, int, float, str, type(None), Tensor, nn.Parameter))
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set))


def is_known_code(model: nn.Module) -> bool:
    """Return whether all that a network runs, hooks and functions that it holds included, is of known packages.

    Example:
        >>> is_known_code(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
        True
        >>> net = nn.Conv2d(3, 4, 1)
        >>> _ = net.register_forward_hook(lambda module, args, out: out.relu())
        >>> is_known_code(net)
        False
    """
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    return all(map(_is_known, modules_of(model)))


def _is_known(module: nn.Module) -> bool:
    held = vars(module)
    return (
        _is_known_class(type(module))  # type: ignore[arg-type]
        and not any(held.get(name) for name in _HOOKS)
        and all(_package(each) in PACKAGES for each in _functions(held.values()))
    )


@lru_cache(maxsize=4096)
def _is_known_class(kind: type) -> bool:
    bases = {base.__module__.partition(".")[0] for base in kind.__mro__[1:]}
    return (
        kind.__module__.partition(".")[0] in PACKAGES
        and bases <= PACKAGES | _BASES
        and not issubclass(kind, _GENERATED)
    )


def _functions(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the functions and callable objects among values, and within containers and partial functions."""
    for value in values:
        if type(value) in _PLAIN or (type(value) in _CONTAINERS and not value):
            continue
        if isinstance(value, partial):
            yield from _functions((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, dict):
            yield from _functions(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield from _functions(value)
        elif callable(value) and not isinstance(value, nn.Module):
            yield value


def _package(function: Any) -> str:
    """Return the package that defines a function, a class or the class of an object; "" if that is not known."""
    name = getattr(function, "__module__", None) or getattr(type(function), "__module__", None) or ""
    return str(name).partition(".")[0]
