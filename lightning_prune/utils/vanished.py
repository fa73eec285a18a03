"""Modules that take the place of those that vanish with a residual block, and what is left of the vanished ones."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.utils.modules import is_within

__all__ = [
    "VANISHED",
    "Passed",
    "Skipped",
    "Zero",
    "original_of",
    "problem_with",
    "release_",
    "replace_modules_",
    "replacement",
    "restore_",
    "structure",
    "train_again_",
    "untrained_parameters",
    "vanish_modules_",
    "vanished_blocks",
    "vanished_modules",
    "vanished_parameters",
    "within_any",
]

#: name of the attribute of a replacement that holds its description, and what is left of the original
VANISHED = "_lightning_prune_vanished"
#: name of the attribute with the names of a module's parameters that only a vanished branch reads
UNTRAINED = "_lightning_prune_untrained"
#: operators without parameters that may follow the addition within a block -> their modules
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "mish": nn.Mish,
}  # fmt: skip
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


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


def replace_module_(model: nn.Module, name: str, description: Mapping[str, Any]) -> nn.Module:
    """Put a replacement in the place of a module under all of its names, and return the module that was there.

    Plain attributes and hooks of the module stay: the code around it may read its sizes, and distillation may tap it.
    """
    original = model.get_submodule(name)
    new = replacement(description, original)
    for attribute, value in vars(original).items():
        if not attribute.startswith("_") and attribute not in vars(new) and not isinstance(value, Tensor):
            vars(new)[attribute] = value
    for attribute in _HOOKS:
        vars(new)[attribute] = vars(original)[
            attribute
        ]  # the same object: handles must find it to remove a hook
    vars(new)[VANISHED] = [dict(description), original]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is original and parent is not new:
                parent._modules[key] = new
    return original


def original_of(module: nn.Module) -> nn.Module | None:
    """Return what is left of the module that this one took the place of; None if it took nobody's."""
    entry = vars(module).get(VANISHED)
    return None if entry is None else entry[1]


def vanished_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Yield the name of every replacement in ``model``, the replacement, and its description."""
    for name, module in model.named_modules():
        if VANISHED in vars(module):
            yield name, module, vars(module)[VANISHED][0]


def release_(model: nn.Module, original: nn.Module) -> None:
    """Free the memory of a module that has vanished from ``model``, and keep its structure.

    Its parameters and the buffers that files hold go to the meta device, as new tensors. Buffers that no file holds
    stay: nothing could restore them.
    """
    present = {id(module) for module in model.modules()}  # the activation of a block stays
    for module in original.modules():
        if id(module) in present:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")


def restore_(model: nn.Module, name: str, device: torch.device) -> None:
    """Put a vanished module back in its place, with zeros for what :func:`release_` has freed."""
    new = model.get_submodule(name)
    original = original_of(new)
    assert original is not None
    for module in original.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                zeros = torch.zeros_like(parameter, device=device)
                module._parameters[key] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros_like(buffer, device=device)
    original.train(new.training)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is new:
                parent._modules[key] = original


def vanish_modules_(model: nn.Module, vanished: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Put replacements in the places of modules, as in a :class:`~lightning_prune.PruningRecord`.

    Their memory is freed; parameters that stay untrained no longer require gradients.

    Returns:
        Name -> the module that was there.
    """
    originals = replace_modules_(model, vanished)
    for original in originals.values():
        release_(model, original)
    return originals


def replace_modules_(model: nn.Module, vanished: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Do as :func:`vanish_modules_`, but free nothing."""
    originals = {}
    for name, what in vanished.items():
        if what.get("as") == "untrained":
            owner, _, parameter = name.rpartition(".")
            module = model.get_submodule(owner)
            vars(module)[UNTRAINED] = sorted({*vars(module).get(UNTRAINED, ()), parameter})
            module._parameters[parameter].requires_grad_(False)  # type: ignore[union-attr]
        else:
            originals[name] = replace_module_(model, name, what)
    return originals


def problem_with(model: nn.Module, vanished: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why modules cannot vanish from ``model`` as described; "" if they can."""
    for name, what in vanished.items():
        owner, _, last = name.rpartition(".")
        try:
            parent = model.get_submodule(owner)
            if what.get("as") == "untrained":
                if not isinstance(parent._parameters.get(last), nn.Parameter):
                    return f"{name!r}, which stays untrained, is no parameter of {type(model).__name__}"
            elif VANISHED in vars(parent.get_submodule(last)):
                return f"the module {name!r} has vanished from {type(model).__name__} already"
            else:
                replacement(what, parent.get_submodule(last))
        except (AttributeError, ValueError, TypeError) as error:
            return f"the module {name!r} cannot vanish from {type(model).__name__}: {error}"
    return ""


def vanished_blocks(model: nn.Module) -> list[str]:
    """Return the names of the residual blocks that have vanished from ``model``, also those within others."""
    found: list[str] = []
    for _, module, what in vanished_modules(model):
        found += what.get("blocks", ())
        original = original_of(module)
        found += [] if original is None else vanished_blocks(original)
    return found


def vanished_parameters(model: nn.Module) -> dict[str, type]:
    """Return the names of the parameters that have vanished from ``model`` -> the class of their module."""
    found: dict[str, type] = {}
    for outer, module, _ in vanished_modules(model):
        original = original_of(module)
        assert original is not None
        names = {f"{outer}.{name}".rstrip("."): each for name, each in original.named_modules()}
        found |= {f"{name}.{key}": type(each) for name, each in names.items() for key in each._parameters}
        found |= {f"{outer}.{name}": kind for name, kind in vanished_parameters(original).items()}
    return found


def untrained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names of the parameters that are left of vanished branches, each with its module."""
    for name, module in model.named_modules():
        for parameter in vars(module).get(UNTRAINED, ()):
            yield (f"{name}.{parameter}" if name else parameter), module


def train_again_(model: nn.Module, left_out: Collection[int] = ()) -> None:
    """Have parameters that were left of vanished branches require gradients again."""
    for _, module in list(untrained_parameters(model)):
        if id(module) not in left_out:
            for parameter in vars(module).pop(UNTRAINED, ()):
                module._parameters[parameter].requires_grad_(True)  # type: ignore[union-attr]


def within_any(name: str, modules: Iterable[str]) -> bool:
    """Return whether ``name`` is that of one of the modules, or of something in one.

    Example:
        >>> within_any("net.conv.weight", ["net.conv"]), within_any("net.conv2.weight", ["net.conv"])
        (True, False)
    """
    return any(is_within(name, module) for module in modules)
