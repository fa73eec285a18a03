"""Name the call that builds a dense network, and make it again from its name.

Only functions of torchvision, timm, segmentation-models-pytorch and this package that return networks are called by
their names: a folder from elsewhere must not run other code. None of them downloads weights then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from lightning_prune.serialization.record import RecordError

__all__ = ["TARGET", "build_network", "describe_factory", "is_known"]

TARGET = "_target_"
#: packages whose networks are known by name
PACKAGES = (
    "torchvision.models",
    "timm",
    "segmentation_models_pytorch",
    "lightning_prune.segmentation",
    "lightning_prune.classification",
)
CREATORS = (
    *("timm.create_model", "segmentation_models_pytorch.create_model", "torchvision.models.get_model"),
    "lightning_prune.classification.cifar_resnet",
)
#: arguments that ask for pretrained weights -> their value without any
WITHOUT_WEIGHTS = {
    **dict.fromkeys(("weights", "weights_backbone", "encoder_weights"), None),
    **dict.fromkeys(("pretrained", "pretrained_backbone"), False),
}
REFUSED = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def describe_factory(factory: Callable[..., nn.Module] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the call that builds a network as plain values.

    Args:
        factory: a function, a class, a ``functools.partial`` of one with its arguments, or a mapping with
            ``"_target_"`` and the arguments.

    Raises:
        ValueError: it has no name that can be imported, or an argument is no number, text or list of them.

    Example:
        >>> describe_factory(partial(nn.Linear, 3, out_features=2))
        {'_target_': 'torch.nn.modules.linear.Linear', 'in_features': 3, 'out_features': 2}
    """
    if isinstance(factory, Mapping):
        description = dict(factory)
    else:
        call = factory if isinstance(factory, partial) else partial(factory)
        named = dict(inspect.signature(call.func).bind_partial(*call.args).arguments)
        description = {TARGET: _public_name(call.func), **named, **call.keywords}
    for name, value in description.items():
        if not _is_plain(value):
            raise ValueError(
                f"the argument {name}={value!r} of the factory cannot be written to a file: give numbers, texts or "
                "lists, or leave the factory out and build the network by hand before loading"
            )
    return description


def _public_name(function: Callable[..., Any]) -> str:
    """Return the import path of a function or class, the shorter one of a package whose networks are known."""
    name = getattr(function, "__qualname__", "")
    module = getattr(function, "__module__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise ValueError(
            f"{function} has no name that can be imported elsewhere: give a function of a module"
        )
    for package in PACKAGES:
        if module.startswith(package) and getattr(import_module(package), name, None) is function:
            return f"{package}.{name}"
    return f"{module}.{name}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def build_network(description: Mapping[str, Any] | None) -> nn.Module:
    """Build the dense network that :func:`describe_factory` described, with random weights.

    Raises:
        RecordError: there is no description, or it names something else than a network of a package that is known.
        ImportError: the package is not installed.

    Example:
        >>> build_network({"_target_": "lightning_prune.segmentation.UNet", "in_channels": 1, "classes": 2}).head
        Conv2d(64, 2, kernel_size=(1, 1), stride=(1, 1))
    """
    if not isinstance(description, Mapping) or not isinstance(description.get(TARGET), str):
        raise RecordError("the folder does not say how to build the network: load_pruned(network, folder)")
    arguments = {name: value for name, value in description.items() if name != TARGET}
    refused = [name for name, value in arguments.items() if name in REFUSED or not _is_harmless(value)]
    call = None if refused else _known(description[TARGET], arguments)
    if call is None:
        raise RecordError(
            f"the network is built by {description[TARGET]}{f' with {refused[0]}' if refused else ''}, which is not "
            f"called on the word of a file: build it yourself, load_pruned(network, folder); arguments: {arguments}"
        )
    names = inspect.signature(call).parameters
    arguments |= {
        name: value for name, value in WITHOUT_WEIGHTS.items() if name in names or name in arguments
    }
    net = call(**arguments)
    if not isinstance(net, nn.Module):
        raise RecordError(f"{description[TARGET]} returned a {type(net).__name__}, not a network")
    return net


def is_known(description: Mapping[str, Any] | None) -> bool:
    """Return whether :func:`build_network` calls what a description names, as far as can be said without a call.

    Example:
        >>> is_known({"_target_": "lightning_prune.segmentation.UNet"}), is_known({"_target_": "mine.Net"})
        (True, False)
    """
    if not description or not isinstance(description.get(TARGET), str):
        return False
    arguments = {name: value for name, value in description.items() if name != TARGET}
    if any(name in REFUSED or not _is_harmless(value) for name, value in arguments.items()):
        return False
    return _known(description[TARGET], arguments) is not None


def _is_harmless(value: Any) -> bool:
    """Whether an argument is plain, names no other object to build, and no place to load from."""
    if isinstance(value, str):
        return ":" not in value and "/" not in value
    if isinstance(value, (list, tuple)):
        return all(map(_is_harmless, value))
    if isinstance(value, Mapping):
        return TARGET not in value and all(map(_is_harmless, value.values()))
    return _is_plain(value)


def _known(target: str, arguments: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the function of a name, if it is one that builds a network; None otherwise."""
    package, _, name = target.rpartition(".")
    if package.startswith("torchvision.models"):
        models = import_module("torchvision.models")
        return (
            getattr(import_module(package), name)
            if name in models.list_models() or target in CREATORS
            else None
        )
    if package.startswith("timm"):
        timm = import_module("timm")
        if target in CREATORS:
            return partial(timm.create_model)
        return partial(timm.create_model, name) if timm.is_model(name) else None
    if package not in PACKAGES or name.startswith("_"):
        return None
    found = getattr(import_module(package), name, None)
    is_network = (
        inspect.isclass(found) and issubclass(found, nn.Module) and not hasattr(found, "training_step")
    )
    return found if is_network or target in CREATORS else None
