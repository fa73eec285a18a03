"""Read the idx files of MNIST-like data sets, plain or compressed by gzip, with checks of their content."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx"]

UNSIGNED_BYTES = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an idx file of unsigned bytes.

    The format: two zero bytes, the type (8), the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values (LeCun et al., http://yann.lecun.com/exdb/mnist).

    Args:
        path: the file; compressed if its name ends in ``.gz``.

    Raises:
        ValueError: the file is no idx file of bytes, is truncated, or has bytes left over.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels-idx1-ubyte")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        ...     read_idx(path)
        array([7, 8, 9], dtype=uint8)
    """
    content = _content(path)
    dimensions = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * dimensions
    if content[:3] != bytes([0, 0, UNSIGNED_BYTES]) or not dimensions or len(content) < start:
        raise ValueError(f"{path} is no idx file of bytes: replace it by a fresh copy")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) - start != prod(shape):
        raise ValueError(
            f"{path} has {len(content) - start} values instead of {prod(shape)}, its shape being {shape}: it is "
            "truncated or damaged; replace it by a fresh copy"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _content(path: Path) -> bytes:
    """Return the bytes of a file, uncompressed."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): replace it by a fresh copy") from error
