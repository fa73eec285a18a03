"""The default device of a process, ``torch.set_default_device``, which is the network's and not this package's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["on_cpu", "on_default_device", "short_name"]

#: the default device outside of `on_cpu`
_outer: ContextVar[torch.device | None] = ContextVar("_outer", default=None)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Create tensors on the CPU in the block, or the decorated function: ids, masks and random positions.

    Example:
        >>> torch.set_default_device("meta")
        >>> with on_cpu():
        ...     inside = torch.zeros(2).device
        ...     with on_default_device():
        ...         network = torch.zeros(2).device
        >>> torch.set_default_device(None)
        >>> inside, network
        (device(type='cpu'), device(type='meta'))
    """
    default = torch.get_default_device()
    if default.type == "cpu":  # most often: a device context costs time in each call of torch
        yield
        return
    token = _outer.set(default)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _outer.reset(token)


@contextmanager
def on_default_device() -> Iterator[None]:
    """Create tensors where the process does in the block, which runs the network, also within :func:`on_cpu`."""
    default = _outer.get()
    if default is None:
        yield
        return
    with default:
        yield


def short_name(device: torch.device) -> str:
    """Return the name of a GPU, else the type of the device.

    Example:
        >>> short_name(torch.device("cpu"))
        'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
