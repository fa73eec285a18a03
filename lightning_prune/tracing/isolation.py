"""Run a network and leave no trace on it (level 0)."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["uncollected", "untouched"]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to the model's attributes, flags, counters and the random state is undone."""
    modules = list(model.modules())
    before = [dict(vars(module)) for module in modules]
    # Registries, and caches that a forward fills: the same object must have the same content again.
    # Most are empty; those need no copy.
    containers = [
        (held, held.copy() if held else ())
        for attributes in before
        for held in attributes.values()
        if type(held) in _CONTAINERS
    ]
    # Fake tensors leave buffers alone, except counters: a scalar on the CPU is computed for real.
    counters = [(b, b.detach().clone()) for b in model.buffers() if b.numel() == 1 and not b.is_meta]
    states = torch.get_rng_state(), random.getstate()
    random.seed(0)  # networks that drop layers at random then do the same in every recording
    try:
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        for held, content in containers:
            _refill(held, content)
        for buffer, value in counters:
            buffer.data.copy_(value)
        torch.set_rng_state(states[0])
        random.setstate(states[1])


_CONTAINERS = frozenset((dict, OrderedDict, list, set))


def _refill(held: Any, content: Any) -> None:
    if not held and not content:
        return
    held.clear()
    if isinstance(held, list):
        held.extend(content)
    else:
        held.update(content)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without the cyclic garbage collector: the block makes many small objects and keeps them, and a search through
    all of a process's objects, set off by their number, would take longer than the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
