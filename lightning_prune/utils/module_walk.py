"""The modules and tensors of a network as lists, by their qualified names.

``nn.Module.named_modules`` and what is built on it yield each module through a generator for each level above it. A
cut needs these lists more than forty times, which took longer than the forward. Order and names are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

__all__ = ["modules_of", "named_buffers", "named_modules", "named_parameters", "tensors_of", "walked_once"]

_Named = list[tuple[str, nn.Module]]


def named_modules(model: nn.Module) -> _Named:
    """Return what ``model.named_modules()`` yields: each module once, with its first name.

    Example:
        >>> [name for name, _ in named_modules(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())))]
        ['', '0', '1', '1.0']
    """
    if id(model) in _STORED:
        return _STORED[id(model)]
    found: _Named = []
    seen: set[int] = set()
    stack: _Named = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        if type(module) not in _PLAIN and not _is_plain(type(module)):
            return list(model.named_modules())
        seen.add(id(module))
        found.append((name, module))
        if children := module._modules:
            prefix = f"{name}." if name else ""
            # Scripted modules have a registry of their own, which is no dictionary.
            for key, child in reversed(list(children.items())):
                if child is not None:
                    stack.append((prefix + key, child))
    return found


_PLAIN: set[type] = set()


def _is_plain(kind: type[nn.Module]) -> bool:
    """Return whether modules of this class name their modules as every module does; remember it if they do."""
    if kind.named_modules is not nn.Module.named_modules:
        return False
    _PLAIN.add(kind)
    return True


#: id of a network -> its modules by name, within :func:`walked_once`
_STORED: dict[int, _Named] = {}


@contextlib.contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Look for the modules of ``model`` once for the whole block, within which none are added or removed.

    The code of ``train()`` may do that: where a module defines its own, the modules are listed anew each time.
    """
    modules = named_modules(model)
    if id(model) in _STORED or any(type(module).train is not nn.Module.train for _, module in modules):
        yield
        return
    _STORED[id(model)] = modules
    try:
        yield
    finally:
        del _STORED[id(model)]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields."""
    return [module for _, module in named_modules(model)]


def named_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what ``model.named_parameters()`` yields: each parameter once, with its first name."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        return list(model.named_parameters())
    return list(_distinct((name, module._parameters) for name, module in named_modules(model)))


def named_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return what ``model.named_buffers()`` yields: each buffer once, with its first name."""
    if type(model).named_buffers is not nn.Module.named_buffers:
        return list(model.named_buffers())
    return list(_distinct((name, module._buffers) for name, module in named_modules(model)))


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return all parameters, then all buffers, each once among its kind."""
    return [tensor for _, tensor in (*named_parameters(model), *named_buffers(model))]


def _distinct(members: Iterable[tuple[str, Mapping[str, Tensor | None]]]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for module_name, tensors in members:
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{module_name}.{name}" if module_name else name, tensor
