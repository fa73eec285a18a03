"""The modules and tensors of a network as lists, by their qualified names.

``nn.Module.named_modules`` and what is built on it yield each module through a generator for each level above it. A
cut needs these lists more than forty times, which took longer than the forward. Order and names are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = [
    "PLAIN_TRAIN",
    "modules_of",
    "named_buffers",
    "named_modules",
    "named_parameters",
    "tensors_of",
    "walked_once",
]

_Named = list[tuple[str, nn.Module]]
_NamedTensors = list[tuple[str, Tensor]]


def named_modules(model: nn.Module) -> _Named:
    """Return what ``model.named_modules()`` yields: each module once, with its first name.

    Example:
        >>> [name for name, _ in named_modules(nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU())))]
        ['', '0', '1', '1.0']
    """
    if id(model) in _STORED:
        return _STORED[id(model)].modules
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


@dataclass
class _Walk:
    """What was found in a network: modules, and parameters and buffers as soon as they were asked for."""

    modules: _Named
    parameters: _NamedTensors | None = None
    buffers: _NamedTensors | None = None


#: ``train()`` methods that set the mode of modules and nothing else, by Python module and class.
PLAIN_TRAIN = {("segmentation_models_pytorch.base.model", "SegmentationModel")}
#: id of a network -> what is in it, within :func:`walked_once`
_STORED: dict[int, _Walk] = {}


@contextlib.contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Look for the modules and tensors of ``model`` once for the whole block, which adds and removes none.

    The code of ``train()`` may do that: where a module defines its own, they are listed anew each time. A forward
    may do it, too, but the trace that runs it puts back what was there.
    """
    modules = named_modules(model)
    if id(model) in _STORED or any(map(_may_swap_modules, {type(module) for _, module in modules})):
        yield
        return
    _STORED[id(model)] = _Walk(modules)
    try:
        yield
    finally:
        del _STORED[id(model)]


def _may_swap_modules(kind: type[nn.Module]) -> bool:
    """Return whether a class has a ``train()`` of its own that may do more than set modes."""
    if kind.train is nn.Module.train:
        return False
    owner = next(base for base in kind.__mro__ if "train" in vars(base))
    return (owner.__module__, owner.__qualname__) not in PLAIN_TRAIN


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields."""
    return [module for _, module in named_modules(model)]


def named_parameters(model: nn.Module) -> _NamedTensors:
    """Return what ``model.named_parameters()`` yields: each parameter once, with its first name."""
    walk = _STORED.get(id(model))
    if walk is not None and walk.parameters is not None:
        return walk.parameters
    if type(model).named_parameters is not nn.Module.named_parameters:
        return list(model.named_parameters())
    found = _distinct([(name, module._parameters) for name, module in named_modules(model)])
    if walk is not None:
        walk.parameters = found
    return found


def named_buffers(model: nn.Module) -> _NamedTensors:
    """Return what ``model.named_buffers()`` yields: each buffer once, with its first name."""
    walk = _STORED.get(id(model))
    if walk is not None and walk.buffers is not None:
        return walk.buffers
    if type(model).named_buffers is not nn.Module.named_buffers:
        return list(model.named_buffers())
    found = _distinct([(name, module._buffers) for name, module in named_modules(model)])
    if walk is not None:
        walk.buffers = found
    return found


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return all parameters, then all buffers, each once among its kind."""
    return [tensor for _, tensor in (*named_parameters(model), *named_buffers(model))]


def _distinct(members: Iterable[tuple[str, Mapping[str, Tensor | None]]]) -> _NamedTensors:
    seen: set[int] = set()
    found: _NamedTensors = []
    for module_name, tensors in members:
        for name, tensor in tensors.items() if tensors else ():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((f"{module_name}.{name}" if module_name else name, tensor))
    return found
