"""Replace the modules that vanish with a residual block, keep what is left of them, and put them back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.utils.stand_ins import Passed, Skipped, Zero, replacement

__all__ = [
    "VANISHED",
    # The classes are in another file now; networks that were stored whole before name this one.
    "Passed",
    "Skipped",
    "Zero",
    "original_of",
    "problem_with",
    "release_",
    "replace_modules_",
    "restore_",
    "train_again_",
    "untrained_parameters",
    "vanish_modules_",
    "vanished_blocks",
    "vanished_modules",
    "vanished_parameters",
]

#: name of the attribute of a replacement that holds its description, and what is left of the original
VANISHED = "_lightning_prune_vanished"
#: name of the attribute with the names of a module's parameters that only a vanished branch reads
UNTRAINED = "_lightning_prune_untrained"
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


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
