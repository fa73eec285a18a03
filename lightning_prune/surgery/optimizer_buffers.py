"""Find what optimizers keep outside of ``optimizer.state``: base optimizers, and tensors in attributes.

Wrappers such as Lookahead and SAM hold another optimizer; others keep lists or dictionaries of tensors, one for each
parameter. Both are found by a walk over all that is reachable from the optimizer.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["OptimizerBuffers", "base_optimizers", "buffers_of"]

MAX_OBJECTS = 100_000
_SEQUENCES = (list, tuple, deque)
#: Packages whose objects hold no state of an optimizer's steps, but may lead to everything else.
_FOREIGN_PACKAGES = {"lightning", "pytorch_lightning", "lightning_fabric", "builtins", "weakref", "torch"}


@dataclass
class OptimizerBuffers:
    """Tensors that an optimizer keeps outside of its state.

    Attributes:
        owned: each with the parameter that it belongs to, whose shape it has.
        opaque: where the others are that have to do with parameters: nobody can say how to cut them.
    """

    owned: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    opaque: list[str] = field(default_factory=list)


def base_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and all others that it holds, such as the one that Lookahead or SAM wraps.

    Those that share their ``state`` with an earlier one are left out.

    Example:
        >>> class Wrapper(torch.optim.SGD):
        ...     def __init__(self, base):
        ...         super().__init__(base.param_groups, lr=0.1)
        ...         self.base = base
        >>> base = torch.optim.Adam([nn.Parameter(torch.ones(2))])
        >>> [type(each).__name__ for each in base_optimizers(Wrapper(base))]
        ['Wrapper', 'Adam']
    """
    by_state: dict[int, Optimizer] = {}
    for _, _, value in _Walk(optimizer).entries():
        if isinstance(value, Optimizer):
            by_state.setdefault(id(value.state), value)
    return list(by_state.values())


def buffers_of(
    optimizer: Optimizer, shapes_before: Mapping[Tensor, torch.Size] | None = None
) -> OptimizerBuffers:
    """Return the tensors that an optimizer, and those that it wraps, keep outside of their states.

    A tensor belongs to a parameter if it is in a dictionary under the parameter or its ``id``, or in a sequence with
    one tensor for each parameter, in their order and of their shapes.

    Args:
        optimizer: any optimizer.
        shapes_before: parameter -> its shape before a cut that was made already.

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> optimizer.slow_weights = [[weight.detach().clone()]]
        >>> [owner is weight for _, owner in buffers_of(optimizer).owned]
        [True]
    """
    return _Walk(optimizer, shapes_before).buffers()


class _Walk:
    """A walk over all that is reachable from an optimizer, without its parameters, states and networks."""

    def __init__(
        self, optimizer: Optimizer, shapes_before: Mapping[Tensor, torch.Size] | None = None
    ) -> None:
        self.optimizer = optimizer
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.parameters = {id(p): p for p in chain.from_iterable(self.groups)}
        self.shapes = {id(p): p.shape for p in self.parameters.values()}
        self.shapes |= {id(p): shape for p, shape in (shapes_before or {}).items() if id(p) in self.shapes}
        self.sizes = self._sizes_of_flat_buffers()

    def entries(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield ``(container, key, value)`` of all that is reached, each value once; the optimizer comes first."""
        seen: set[int] = set()
        pending: deque[tuple[Any, Any, Any]] = deque([(None, "", self.optimizer)])
        keep_alive = []  # ids are those of living objects only
        while pending and len(seen) < MAX_OBJECTS:
            container, key, value = pending.popleft()
            if id(value) in seen or id(value) in self.parameters:
                continue
            seen.add(id(value))
            keep_alive.append(value)
            yield container, key, value
            pending.extend((value, inner_key, inner) for inner_key, inner in self._inside(value))

    def buffers(self) -> OptimizerBuffers:
        """Return all tensors outside of states that have to do with a parameter."""
        found, owners = OptimizerBuffers(), dict[int, Tensor]()
        paths: dict[int, str] = {id(self.optimizer): type(self.optimizer).__name__}
        for container, key, value in self.entries():
            name = key if isinstance(key, str) else "..." if isinstance(key, Tensor) else f"[{key}]"
            paths.setdefault(id(value), f"{paths.get(id(container), '')}.{name}".replace(".[", "["))
            owner = self._owner_of_key(container, key)
            owner = owners.get(id(container)) if owner is None else owner
            if owner is not None:
                owners[id(value)] = owner
            if isinstance(value, Tensor):
                owner = self._owner_by_place(container, key, value) if owner is None else owner
                self._add(found, value, owner, paths[id(value)])
        return found

    def _add(self, found: OptimizerBuffers, tensor: Tensor, owner: Tensor | None, path: str) -> None:
        if tensor.numel() <= 1:
            return
        if owner is not None and tensor.shape == self.shapes[id(owner)] and tensor._base is None:
            found.owned.append((tensor, owner))
        elif owner is not None or self._resembles_parameters(tensor):
            found.opaque.append(path)

    def _resembles_parameters(self, tensor: Tensor) -> bool:
        """Whether it has the shape of a parameter, of several stacked, or the size of all of a group."""
        shapes = set(self.shapes.values())
        stacked = tensor.dim() > 2 and tensor.shape[1:] in shapes
        return tensor.shape in shapes or stacked or (tensor.dim() == 1 and tensor.numel() in self.sizes)

    def _sizes_of_flat_buffers(self) -> set[int]:
        numbers = [[self.shapes[id(p)].numel() for p in group] for group in self.groups if len(group) > 1]
        return {sum(group) for group in numbers} | {sum(map(sum, numbers))}

    def _owner_of_key(self, container: Any, key: Any) -> Tensor | None:
        """Return the parameter that is the key of a dictionary, or whose id is."""
        if not isinstance(container, Mapping):
            return None
        return self.parameters.get(key if isinstance(key, int) else id(key))

    def _owner_by_place(self, container: Any, key: Any, tensor: Tensor) -> Tensor | None:
        """Return the parameter at the same place of the group whose shapes a container has; None if it is unclear."""
        if isinstance(container, Mapping):
            # Its order means nothing, so the shape must be that of one parameter.
            alike = [p for p in self.parameters.values() if self.shapes[id(p)] == tensor.shape]
            return alike[0] if len(alike) == 1 else None
        if not isinstance(container, _SEQUENCES):
            return None
        shapes = [getattr(item, "shape", None) for item in container]
        lists = [
            params for params in self._parameter_lists() if [self.shapes[id(p)] for p in params] == shapes
        ]
        places = {id(params[key]): params[key] for params in lists}
        return next(iter(places.values())) if len(places) == 1 else None

    def _parameter_lists(self) -> Iterator[Sequence[Tensor]]:
        """Yield the parameters of each group and of all groups, and those of them that require gradients."""
        for params in (*self.groups, list(chain.from_iterable(self.groups))):
            yield params
            yield [p for p in params if p.requires_grad]

    def _inside(self, value: Any) -> Iterator[tuple[Any, Any]]:
        """Yield what is directly within a value, by key, index or name of an attribute."""
        if isinstance(value, Optimizer):
            states = {id(value.state), id(value.param_groups)}
            yield from ((k, v) for k, v in vars(value).items() if id(v) not in states)
            for index, group in enumerate(value.param_groups):
                yield f"param_groups[{index}]", {k: v for k, v in group.items() if k != "params"}
            yield from _in_class(type(value))
        elif isinstance(value, Mapping):
            yield from list(value.items())
        elif isinstance(value, (*_SEQUENCES, set, frozenset)):
            yield from enumerate(value)
        elif isinstance(value, partial):
            yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
        elif isinstance(value, types.MethodType):
            yield from (("__self__", value.__self__), ("__func__", value.__func__))
        elif isinstance(value, types.FunctionType):
            yield from _in_closure(value)
        elif isinstance(value, nn.Module):
            yield from self._in_module(value)
        elif _is_plain_object(value):
            yield from list(vars(value).items())

    def _in_module(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a module, unless it is the network that is trained."""
        if not any(id(p) in self.parameters for p in module.parameters()):
            yield from chain(module.named_parameters(), module.named_buffers())


def _is_plain_object(value: Any) -> bool:
    """Whether it is an instance with attributes of a class that belongs to an optimizer, or may do so."""
    is_instance = hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, Tensor))
    return is_instance and type(value).__module__.split(".")[0] not in _FOREIGN_PACKAGES


def _in_class(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield what the classes of a user's optimizer hold: containers, and closures of their methods."""
    for each in kind.__mro__:
        if each.__module__.split(".")[0] not in _FOREIGN_PACKAGES:
            for name, value in vars(each).items():
                if isinstance(value, (*_SEQUENCES, dict, Tensor, types.FunctionType)) and name[:2] != "__":
                    yield name, value


def _in_closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
