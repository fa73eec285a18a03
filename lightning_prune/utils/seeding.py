"""State of the global random generators of torch, NumPy and Python, and seeds."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

__all__ = ["derive_seed", "random_state", "seeded", "set_random_state", "torch_generators"]


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Return the states of torch's, NumPy's and Python's global generators, and of ``generators``.

    They are tensors and plain numbers, so that they can be stored in checkpoints.

    Example:
        >>> state = random_state()
        >>> drawn = torch.rand(3), np.random.rand(), random.random()
        >>> set_random_state(state)
        >>> bool((torch.rand(3) == drawn[0]).all()), np.random.rand() == drawn[1], random.random() == drawn[2]
        (True, True, True)
    """
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - data sets draw from it
    numpy_state = tree_map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, numpy_state)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": numpy_state,
        "python": [version, list(internal), gauss],
        "generators": [generator.get_state() for generator in generators],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Set the generators to a result of :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = dict(state["numpy"], state=dict(state["numpy"]["state"]))
    if "key" in numpy_state["state"]:
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    for generator, saved in zip(generators, state["generators"], strict=False):
        generator.set_state(saved.cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def torch_generators() -> list[torch.Generator]:
    """Return the global generators of torch: that of the CPU, and those of all GPUs if this process uses any.

    Example:
        >>> torch_generators()[0] is torch.default_generator
        True
    """
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *gpus]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators within the block, those of all GPUs too, and restore their states afterwards.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(())
        >>> with seeded(1):
        ...     first == torch.rand(())
        tensor(True)
    """
    generators = torch_generators()
    before, had_gpus = random_state(generators), torch.cuda.is_initialized()
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before, generators)
        if torch.cuda.is_available() and not had_gpus:  # they have, or will get, the seed of this block
            torch.cuda.manual_seed_all(torch.initial_seed())


def derive_seed(*names: object) -> int:
    """Return a seed that depends only on ``names``, equal in every process.

    Example:
        >>> derive_seed(0, 3, "encoder.layer1")
        3694324058
    """
    return zlib.crc32("\0".join(map(str, names)).encode())
