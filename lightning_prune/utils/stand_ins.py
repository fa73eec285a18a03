"""Modules that take the place of those that vanish with a residual block."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Passed", "Skipped", "Zero", "replacement", "structure"]

#: operators without parameters that may follow the addition within a block -> their modules
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "mish": nn.Mish,
}  # fmt: skip


class Skipped(nn.Module):
    """A block of which only the shortcut is left, and the activation behind the addition.

    Args:
        source: position of the block's input among the arguments.
        activation: applied to it; None: nothing.
        name: under which the block held the activation.
        nested: whether the block returned its output as the only entry of a tuple.
        copied: whether a copy of the input is returned, since the code behind the block works in place.

    Example:
        >>> Skipped(activation=nn.ReLU())(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def __init__(
        self,
        source: int = 0,
        activation: nn.Module | None = None,
        name: str = "activation",
        nested: bool = False,
        copied: bool = False,
    ) -> None:
        super().__init__()
        self.copied = copied
        self.source, self.activation_name, self.nested = (
            source,
            name if activation is not None else "",
            nested,
        )
        if activation is not None:
            self.add_module(name, activation)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's input, activated."""
        out = args[self.source]
        if self.activation_name:
            out = self._modules[self.activation_name](out)  # type: ignore[misc]
        if self.copied:
            out = out.clone()
        return (out,) if self.nested else out


class Zero(nn.Module):
    """The last module of a vanished branch: returns zero, which the network adds to the shortcut.

    Args:
        outputs: nested lists, dictionaries and ``"x"`` for a tensor: the structure of what the module returned.
        full: whether zeros of the shape of the input are returned, not a single one.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> Zero()(x) + x
        tensor([1., 2.])
    """

    def __init__(self, outputs: Any = "x", full: bool = False) -> None:
        super().__init__()
        self.outputs, self.full = outputs, full

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zero in the structure of the module's output."""
        x = _first_tensor(args, kwargs)
        return _structured(self.outputs, torch.zeros_like(x) if self.full else x.new_zeros(()))


class Passed(nn.Module):
    """Another module of a vanished branch: returns its input, which nothing depends on any more.

    Args:
        outputs: the structure of what the module returned, as for :class:`Zero`.

    Example:
        >>> Passed(["x", None])(torch.tensor([1.0]))
        (tensor([1.]), None)
    """

    def __init__(self, outputs: Any = "x") -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor in the structure of the module's output."""
        return _structured(self.outputs, _first_tensor(args, kwargs))


def structure(value: Any) -> Any:
    """Return the structure of a module's result as plain values; raise ValueError if it has other objects.

    Example:
        >>> structure((torch.zeros(1), None)), structure({"out": torch.zeros(1)})
        (['x', None], {'out': 'x'})
    """
    if isinstance(value, Tensor):
        return "x"
    if value is None:
        return None
    if type(value) in (tuple, list):
        return [structure(item) for item in value] + (["list"] if type(value) is list else [])
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: structure(item) for key, item in value.items()}
    raise ValueError(f"returns a {type(value).__name__}")


def _structured(outputs: Any, tensor: Tensor) -> Any:
    if outputs == "x":
        return tensor
    if isinstance(outputs, list):
        items = [_structured(item, tensor) for item in outputs if item != "list"]
        return items if outputs[-1:] == ["list"] else tuple(items)
    return None if outputs is None else {key: _structured(item, tensor) for key, item in outputs.items()}


def _first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (tuple, list)):
            for item in value:
                if isinstance(item, Tensor):
                    return item
    raise TypeError("a module of a branch that has vanished was called without a tensor")


def replacement(description: Mapping[str, Any], original: nn.Module) -> nn.Module:
    """Return the module that takes the place of ``original``.

    Args:
        description: plain values: ``as`` is ``"skipped"``, ``"zero"`` or ``"passed"``, the other entries are their
            arguments; ``activation`` is the name of a child, or one of ``ACTIVATIONS``.
        original: the module that vanishes.

    Raises:
        ValueError: the description is damaged, or belongs to another module.
    """
    kind = description.get("as")
    if kind == "zero":
        new: nn.Module = Zero(description.get("outputs", "x"), bool(description.get("full", False)))
    elif kind == "passed":
        new = Passed(description.get("outputs", "x"))
    elif kind == "skipped":
        new = _skipped(description, original)
    else:
        raise ValueError(f"no module takes the place of another as {kind!r}")
    new.train(original.training)
    return new


def _skipped(description: Mapping[str, Any], original: nn.Module) -> nn.Module:
    name, function = description.get("activation") or "", description.get("function") or ""
    activation: nn.Module | None = None
    if name:
        child = original._modules.get(name)
        if child is None:
            raise ValueError(f"the block has no module {name!r}")
        activation = out_of_place(child)
    elif function:
        if function not in ACTIVATIONS:
            raise ValueError(f"unknown activation {function!r}")
        activation = ACTIVATIONS[function](**dict(description.get("options", {})))
    return Skipped(
        int(description.get("source", 0)),
        activation,
        name or "activation",
        bool(description.get("nested", False)),
        bool(description.get("copy", False)) and activation is None,
    )


def out_of_place(activation: nn.Module) -> nn.Module:
    """Return the activation, or a copy that does not work in place: its input may be needed elsewhere."""
    if getattr(activation, "inplace", False) is not True:
        return activation
    activation = copy.copy(activation)
    activation.inplace = False  # type: ignore[assignment]
    return activation
