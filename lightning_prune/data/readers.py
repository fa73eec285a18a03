"""Stored numbers of one image: from PNG, JPEG, TIFF, BMP, GIF and WebP by Pillow, from others by their volume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lightning_prune.data.volumes import TIFFS, VOLUMES, Limits, num_volume_slices, read_volume

__all__ = ["EXTENSIONS", "extension", "num_slices", "pixels_of", "read_colours", "read_values"]

EXTENSIONS = (".png", ".jpg", ".jpeg", *TIFFS, ".bmp", ".gif", ".webp", *VOLUMES)
BITS_PER_SAMPLE = 258  # a tag of TIFF
BYTE, WORD = (0.0, 255.0), (0.0, 65535.0)


def extension(file: Path) -> str:
    """Return which of the known extensions a file name has; empty if none.

    Example:
        >>> extension(Path("scan.nii.gz")), extension(Path("a.PNG")), extension(Path("notes.txt"))
        ('.nii.gz', '.PNG', '')
    """
    for known in sorted(EXTENSIONS, key=len, reverse=True):
        if file.name.lower().endswith(known):
            return file.name[-len(known) :]
    return ""


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn errors of an image reader in the block into a ValueError that names ``file`` as damaged."""
    try:
        yield
    except (ImportError, MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # readers raise many types, also SyntaxError for a broken PNG
        raise ValueError(
            f"{file} cannot be read as an image ({error}): it is damaged, or of another format than its name "
            "says; replace it or move it away"
        ) from error


def is_volume(file: Path, channels: int = 3) -> bool:
    """Whether Pillow cannot read a file: by its format, its pages, its kind of numbers, or its many channels."""
    if not file.name.lower().endswith(TIFFS):
        return file.name.lower().endswith(VOLUMES)
    try:
        with Image.open(file) as opened:
            bits = getattr(opened, "tag_v2", {}).get(BITS_PER_SAMPLE, ())
            deep_colours = len(bits) > 1 and max(bits) > 8  # of which Pillow keeps 8 bits
            return getattr(opened, "n_frames", 1) > 1 or channels not in (1, 3) or deep_colours
    except OSError:  # colours in floating point, for example
        return file.is_file()


def num_slices(file: Path) -> int:
    """Return how many images a file has.

    Raises:
        ValueError: it cannot be read.
        ImportError: the package that reads it is not installed.
    """
    if not file.name.lower().endswith((*TIFFS, *VOLUMES)) or not is_volume(file):
        return 1
    with readable(file):
        return num_volume_slices(file)


def pixels_of(file: Path, channels: int, index: int | None = 0) -> tuple[NDArray[Any], Limits]:
    """Return the numbers ``(h, w)`` or ``(h, w, c)`` of an image, and which of them mean black and white.

    Args:
        file: the image.
        channels: of the image that is wanted. Palettes and colours of 8 bits are converted to 1 or 3.
        index: which image of a file with several; None: all of them, as channels.
    """
    with readable(file):
        if is_volume(file, channels):
            volume = read_volume(file)
            return (
                np.moveaxis(volume.values, 0, -1) if index is None else volume.values[index]
            ), volume.limits
        with Image.open(file) as opened:
            # Photographs of phones lie on their side, with a note to turn them; masks are drawn on the turned ones.
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                deep = np.asarray(image)
                return deep, WORD if np.issubdtype(deep.dtype, np.integer) else None
            mode = {1: "L", 3: "RGB"}.get(channels)
            return np.array(image if mode is None else image.convert(mode)), BYTE


def read_values(file: Path, index: int = 0) -> NDArray[Any]:
    """Return the stored numbers of a mask ``(h, w)`` or ``(h, w, c)``; of a palette image the indices."""
    with readable(file):
        if is_volume(file):
            return np.asarray(read_volume(file).values[index])
        with Image.open(file) as opened:
            return np.array(opened)


def read_colours(file: Path, index: int = 0) -> NDArray[np.uint8]:
    """Return the colours of a mask ``(h, w, 3)``, also of a palette or grey image."""
    if is_volume(file):
        values = read_values(file, index)
        return np.asarray(values if values.ndim == 3 else np.stack([values] * 3, -1))[..., :3]
    with readable(file), Image.open(file) as opened:
        return np.array(opened.convert("RGB"))
