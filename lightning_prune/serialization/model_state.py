"""Put a network back as it was if loading it fails half-way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.utils.modules import named_tensors, set_data

__all__ = ["unchanged_on_error"]


@contextmanager
def unchanged_on_error(model: nn.Module, replaced: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore tensors, attributes and extra state of ``model`` if the block raises.

    Args:
        model: the network.
        replaced: tensors that get new data instead of new values; of all others the values are copied meanwhile.

    Example:
        >>> from contextlib import suppress
        >>> net = nn.Linear(1, 1)
        >>> before = net.weight.item()
        >>> with suppress(KeyError), unchanged_on_error(net):
        ...     _ = net.weight.data.zero_()
        ...     raise KeyError
        >>> net.weight.item() == before
        True
    """
    keep_old = {id(tensor) for tensor in replaced}
    restore = [
        _tensor_restorer(tensor, id(tensor) not in keep_old) for tensor in named_tensors(model).values()
    ]
    restore += [_module_restorer(module) for module in model.modules()]
    try:
        yield
    except BaseException:
        for each in reversed(restore):  # modules first: a tensor may have been replaced by another object
            each()
        raise


def _tensor_restorer(tensor: Tensor, copy_values: bool) -> Callable[[], None]:
    data, grad, requires_grad = tensor.data, tensor.grad, tensor.requires_grad
    values = data.clone() if copy_values and not data.is_meta else None

    def restore() -> None:
        if data.layout == torch.strided and not (data.is_nested or data.is_quantized):
            set_data(tensor, data)
        if values is not None:
            data.copy_(values)
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        tensor.grad = grad

    return restore


def _module_restorer(module: nn.Module) -> Callable[[], None]:
    """Return a function that restores the attributes of one module, and what its containers hold."""
    attributes = dict(vars(module))
    copied = _deep if _runs_own_code(module) else copy.copy
    contents = {
        # Parameters, buffers and submodules are restored on their own: here only which ones there are.
        name: copy.copy(value) if name in ("_parameters", "_buffers", "_modules") else copied(value)
        for name, value in attributes.items()
        if isinstance(value, (dict, list, set))
    }

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        for name, content in contents.items():
            container = attributes[name]
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)

    return restore


def _runs_own_code(module: nn.Module) -> bool:
    """Whether loading a state_dict calls methods of the module's class that may change anything in it."""
    kind = type(module)
    return (
        kind.set_extra_state is not nn.Module.set_extra_state
        or kind._load_from_state_dict is not nn.Module._load_from_state_dict
    )


def _deep(value: Any) -> Any:
    """Return a copy of nested containers and of the tensors in them; other objects are the same."""
    if isinstance(value, dict):
        return {key: _deep(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_deep(entry) for entry in value]
    if isinstance(value, set):
        return set(value)
    is_state = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return value.detach().clone() if is_state else value
