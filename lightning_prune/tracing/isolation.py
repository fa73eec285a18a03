"""Context managers that isolate the process from a trace: state of the model, random numbers, garbage collector."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.utils.module_walk import modules_of, named_buffers
from lightning_prune.utils.passing import is_passing
from lightning_prune.utils.seeding import torch_generators

__all__ = ["gc_paused", "restored"]

_CONTAINERS = frozenset((dict, OrderedDict, list, set))


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's attributes, modes and counters, and the random state, at the end of the block.

    Buffers of more than one element are not restored. If the block fails for lack of memory and the like, flags that
    it has set stay: a module that notes by one that it has failed must be able to succeed the next time.
    """
    modules = modules_of(model)
    attributes_before = [dict(vars(module)) for module in modules]
    # Registries, and caches that a forward fills: the same object must have the same content again.
    # Most are empty and need no copy.
    containers = [
        (value, value.copy() if value else ())
        for attributes in attributes_before
        for value in attributes.values()
        if type(value) in _CONTAINERS
    ]
    # Fake tensors do not change buffers, except counters: a scalar on the CPU is computed for real.
    counters = [(b, b.detach().clone()) for _, b in named_buffers(model) if b.numel() == 1 and not b.is_meta]
    generators = torch_generators()
    torch_states, python_state = [generator.get_state() for generator in generators], random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    # Networks that choose layers or sizes at random choose the same ones in every recording.
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    for generator in generators:
        generator.manual_seed(0)
    try:
        yield
    except BaseException as error:
        if is_passing(error):
            for module, attributes in zip(modules, attributes_before, strict=True):
                attributes.update(_flags(module))
        raise
    finally:
        for module, attributes in zip(modules, attributes_before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in containers:
            if container or content:
                _refill(container, content)
        for buffer, value in counters:
            buffer.data.copy_(value)
        for generator, state in zip(generators, torch_states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _flags(module: nn.Module) -> dict[str, bool]:
    """Return the attributes that are True or False, but for the mode."""
    return {name: value for name, value in vars(module).items() if type(value) is bool and name != "training"}


def _refill(container: Any, content: Any) -> None:
    """Make ``content`` the content of a dictionary, list or set."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Disable the cyclic garbage collector within the block.

    A trace makes many small objects and keeps them. Their number starts collections over all objects of the process,
    which would take longer than the trace.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
