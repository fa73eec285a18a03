"""Small files in the formats of Fashion-MNIST, for tests without the data set."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = {"train": "train", "test": "t10k"}


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """Return the content of an idx file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(
    folder: Path, counts: dict[str, int], fills: dict[str, int], compressed: bool = True
) -> Path:
    """Write the four files: each item is a filled square of 14 x 20 pixels; labels are 0, 1, ..., 9, 0, ...

    Args:
        folder: where to write.
        counts: number of items of ``"train"`` and ``"test"``.
        fills: grey value of the items of both.
        compressed: write ``.gz``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage, prefix in NAMES.items():
        images = np.zeros((counts[stage], 28, 28), np.uint8)
        images[:, 4:24, 7:21] = fills[stage]
        labels = (np.arange(counts[stage]) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content) if compressed else content)
    return folder
