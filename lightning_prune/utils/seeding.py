"""Where the global random generators are, and putting them there (level 0)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

__all__ = ["random_state", "seed_of", "seeded", "set_random_state"]


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Where torch's, NumPy's and Python's global generators are, and ``generators``: tensors and plain numbers.

    Example:
        >>> state = random_state()
        >>> drawn = torch.rand(3), np.random.rand(), random.random()
        >>> set_random_state(state)
        >>> bool((torch.rand(3) == drawn[0]).all()), np.random.rand() == drawn[1], random.random() == drawn[2]
        (True, True, True)
    """
    held = np.random.get_state(legacy=False)  # noqa: NPY002 - data sets draw from it
    numpy_state = tree_map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, held)
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
    """Put the generators where :func:`random_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = dict(state["numpy"], state=dict(state["numpy"]["state"]))
    if "key" in numpy_state["state"]:
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    for generator, place in zip(generators, state["generators"], strict=False):
        generator.set_state(place.cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` on; afterwards go on from where it was.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(())
        >>> with seeded(1):
        ...     first == torch.rand(())
        tensor(True)
    """
    before = random_state()
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


def seed_of(*names: object) -> int:
    """A seed that follows from ``names`` alone, the same in every process.

    Example:
        >>> seed_of(0, 3, "encoder.layer1")
        3694324058
    """
    return zlib.crc32("\0".join(map(str, names)).encode())
