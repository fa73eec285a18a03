"""Helpers for modules and their tensors: names, cutting along dimensions, new data, train and eval mode."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.utils.cached_functions import FUNCTIONS, cached_at
from lightning_prune.utils.module_walk import modules_of, named_buffers, named_parameters
from lightning_prune.utils.train_modes import mode_is_only_a_flag

Value = TypeVar("Value")
#: Types of most attributes of modules, looked up faster than ``isinstance`` answers.
_NO_FUNCTIONS = frozenset((bool, int, float, str, type(None), tuple, dict, OrderedDict, set))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by qualified name, shared ones once."""
    return {**dict(named_parameters(model)), **dict(named_buffers(model))}


def tensors_by_all_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under all of its qualified names, as ``state_dict()`` has them."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def named_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of parameters and buffers by qualified name, shared ones once."""
    return {name: tensor.shape for name, tensor in named_tensors(model).items()}


def floating_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype of the first tensor of floating-point numbers; None if there is none.

    Example:
        >>> floating_dtype([torch.tensor(1), torch.tensor(0.5)])
        torch.float32
    """
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def stored_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer of a module as it is stored; None if it has none, or computes it when it is read.

    Reading the attribute would run the code of a parametrisation, and change the vectors of spectral norm.
    """
    stored = module._parameters.get(name)
    return module._buffers.get(name) if stored is None else stored


def declared(module: nn.Module, name: str) -> Any:
    """Return an attribute that a module or its class defines, else None; its ``__getattr__`` is not asked.

    Example:
        >>> declared(nn.Linear(1, 1), "in_features"), declared(nn.Linear(1, 1), "weight")
        (1, None)
    """
    return getattr(module, name) if name in vars(module) or hasattr(type(module), name) else None


def has_compiled_parts(model: nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to the module or a part of it, so that hooks do not run."""
    # torch.compile(module) makes an OptimizedModule, module.compile() sets the private attribute of torch.
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )


def is_within(name: str, module: str) -> bool:
    """Return whether ``name`` is that of ``module`` or of something in it; ``""`` is the whole.

    Example:
        >>> is_within("net.conv", "net"), is_within("network", "net"), is_within("net", "")
        (True, False, True)
    """
    return not module or f"{name}.".startswith(f"{module}.")


def without_prefix(entries: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Return the entries whose names start with ``prefix``, and remove it from the names.

    Example:
        >>> without_prefix({"net.weight": 1, "loss.weight": 2}, "net.")
        {'weight': 1}
    """
    return {name.removeprefix(prefix): x for name, x in entries.items() if name.startswith(prefix)}


def cut(tensor: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    """Return a new tensor with only the given indices of each dimension, in the same memory format."""
    data = tensor.detach()
    for dim, indices in dims.items():
        # A list becomes a tensor three times as fast by way of numpy.
        places = torch.from_numpy(np.array(indices, dtype=np.int64)).to(data.device)
        data = data.index_select(dim, places)
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not tensor.is_contiguous():
        return data.contiguous(memory_format=torch.channels_last)
    return data.contiguous()


def cut_shape(shape: Sequence[int], dims: Mapping[int, list[int]]) -> list[int]:
    """Return the shape that :func:`cut` leaves of a tensor.

    Example:
        >>> cut_shape([4, 3], {0: [1, 2]})
        [2, 3]
    """
    return [len(dims[dim]) if dim in dims else size for dim, size in enumerate(shape)]


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Give the tensor object other data, of another shape if need be. References to the object stay valid."""
    # While a loss computed earlier is alive, autograd keeps the node that accumulates the gradient, and this node
    # expects the old shape. A change of dtype makes autograd create a new node, so the dtype changes briefly.
    other = torch.float32 if data.dtype == torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = None


def freeze_empty_(tensors: Iterable[Tensor]) -> None:
    """Set ``requires_grad`` to False for tensors without elements.

    No forward uses them, and DistributedDataParallel raises for trainable parameters that get no gradient.
    """
    for tensor in tensors:
        if not tensor.numel() and tensor.requires_grad:
            tensor.requires_grad_(False)


def same_values(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same shape and values, where NaN equals NaN.

    Example:
        >>> same_values(torch.tensor([1, torch.nan]), torch.tensor([1, torch.nan]))
        True
    """
    if torch.equal(left, right):
        return True
    return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())


@contextmanager
def training_modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put modules for which ``training`` is True in train mode and the others in eval mode; restore at the end."""
    before = [(module, module.training) for module in modules_of(model)]
    for module, _ in before:
        module.training = training(module)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def without_forward_hooks(model: nn.Module) -> Iterator[None]:
    """Leave out the forward hooks of a model and its submodules, but not pre-hooks, which may compute weights."""
    hooks = [(module, module._forward_hooks) for module in modules_of(model)]
    for module, _ in hooks:
        module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, registered in hooks:
            module._forward_hooks = registered


def drop_caches_(model: nn.Module) -> None:
    """Make modules drop what they computed from their weights in eval mode, as they do when training begins.

    LeViT, EfficientFormer and others keep such values until ``train()``. The modes stay as they are. Functions and
    methods under ``functools.lru_cache`` next to the modules' code forget their results, whose keys may be modules
    or parameters.
    """
    for function in _cached_functions(model):
        function.cache_clear()
    if mode_is_only_a_flag(model):
        return  # no code runs when the mode changes
    with training_modes(model, lambda module: module.training):
        model.train(not model.training)
        model.train(not model.training)


def _cached_functions(model: nn.Module) -> set[Any]:
    """Return the cached functions in the Python modules that define the modules' classes, and in these classes."""
    classes = {base for kind in {type(module) for module in modules_of(model)} for base in kind.__mro__}
    own = {base for base in classes if base.__module__.partition(".")[0] not in ("torch", "builtins", "abc")}
    files = {sys.modules.get(base.__module__) for base in own} - {None}
    beside = {value for file in files for value in vars(file).values() if _is_beside(value, file)}
    attributes = (
        (owner, *each)
        for owner in (*own, *files, *beside, *modules_of(model))
        for each in vars(owner).items()
        if type(each[1]) not in _NO_FUNCTIONS and isinstance(each[1], FUNCTIONS)
    )
    return {place.function for attribute in attributes for place in cached_at(*attribute)}


def _is_beside(value: Any, file: Any) -> bool:
    """Whether a value is a Python module of the same library as ``file``."""
    return (
        isinstance(value, ModuleType) and value.__name__.partition(".")[0] == file.__name__.partition(".")[0]
    )


def within_any(name: str, modules: Iterable[str]) -> bool:
    """Return whether ``name`` is that of one of the modules, or of something in one.

    Example:
        >>> within_any("net.conv.weight", ["net.conv"]), within_any("net.conv2.weight", ["net.conv"])
        (True, False)
    """
    return any(is_within(name, module) for module in modules)
