"""Pairing of the files of images and masks by their names, and reading of images.

`lightning_prune.data.mask_files` reads masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.data.mask_files import Palette, read_mask
from lightning_prune.data.readers import EXTENSIONS, extension, pixels_of
from lightning_prune.data.volumes import Limits

__all__ = ["EXTENSIONS", "Pair", "Palette", "files_by_key", "find_pairs", "read_image", "read_mask"]

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow makes grey (ITU-R BT.601)


class Pair(NamedTuple):
    """The files of one sample.

    Attributes:
        image: file of the image.
        mask: file of the mask.
        page: which image of files with several; None: all images of the first file, as channels of one.
    """

    image: Path
    mask: Path
    page: int | None = 0


def find_pairs(
    images: Path, masks: Path, image_suffix: str = "", mask_suffix: str = "", unmasked: bool = False
) -> list[Pair]:
    """Return the images with their masks, sorted by name.

    Args:
        images: folder of the images, searched with its subfolders.
        masks: folder of the masks; may be the same one if the suffixes differ.
        image_suffix: end of the images' names before the extension; other files are ignored.
        mask_suffix: end of the masks' names before the extension.
        unmasked: ignore images without mask instead of raising.

    Raises:
        FileNotFoundError: a folder or all images are missing.
        ValueError: an image has no mask or the reverse, or two images have the same name.
    """
    image_files = files_by_key(images, image_suffix)
    mask_files = files_by_key(masks, mask_suffix)
    if images == masks:
        image_files, mask_files = _separate(image_files, mask_files, image_suffix, mask_suffix)
    if not image_files:
        raise FileNotFoundError(f"no images {image_suffix}{{{','.join(EXTENSIONS)}}} in {images}")
    if unmasked:
        image_files = {key: file for key, file in image_files.items() if key in mask_files}
    _check_partners(image_files, mask_files, "images", f"masks in {masks}", "mask_suffix")
    _check_partners(mask_files, image_files, "masks", f"images in {images}", "image_suffix")
    return [Pair(image_files[key], mask_files[key]) for key in sorted(image_files)]


def read_image(
    file: Path, channels: int = 3, index: int | None = 0, window: Sequence[float] | None = None
) -> Tensor:
    """Read an image as ``(channels, h, w)`` float32, scaled to 0 to 1.

    Files of 8 and 16 bits are scaled by their whole range, DICOM and NIfTI by the 0.5th and 99.5th percentile of the
    file. Floating point numbers of other files stay as they are.

    Args:
        file: the image; `lightning_prune.data.readers` lists the formats.
        channels: 1 for grey, 3 for colour, or the number that the file has.
        index: which image of a file with several; None: all of them, as channels.
        window: numbers that become 0 and 1, such as ``(-160, 240)`` Hounsfield units; others are clipped.

    Raises:
        ValueError: the file is damaged, has another number of channels, or numbers that are not finite.
        ImportError: a package that reads it is not installed.
    """
    pixels, limits = pixels_of(file, channels, index)
    pixels = _with_channels(pixels, channels, file)
    if not np.isfinite(pixels).all():
        bad = pixels.size - int(np.isfinite(pixels).sum())
        raise ValueError(
            f"{file}: {bad} of {pixels.size} numbers are NaN or infinite, and training on them would end in NaN: "
            "write numbers in their place, such as the mean of the others"
        )
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(_scaled(pixels, limits, window), -1, 0)))


def _with_channels(pixels: NDArray[Any], channels: int, file: Path) -> NDArray[Any]:
    """Return pixels ``(h, w, channels)``: grey ones repeated, colours without alpha, or as grey."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    number = pixels.shape[2]
    if number == channels:
        return pixels
    if number == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if number in (3, 4) and channels == 3:
        return pixels[..., :3]
    if number in (3, 4) and channels == 1:
        return np.asarray(pixels[..., :3] @ np.array(LUMINANCE))[..., None]
    raise ValueError(f"channels={channels}: {file} has {number}; 1 (grey), 3 (colour) or as many can be read")


def _scaled(pixels: NDArray[Any], limits: Limits, window: Sequence[float] | None) -> NDArray[np.float32]:
    """Scale numbers to 0 to 1; those outside of a window, or of the percentiles of a volume, are clipped."""
    numbers = pixels.astype(np.float32)
    if window is None and limits is None:
        return numbers
    low, high = window or limits or (0, 1)
    return np.clip((numbers - np.float32(low)) / np.float32(high - low), 0, 1)


def files_by_key(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Return the image files whose stem ends with ``suffix``, by their path below the folder without it.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: two files have the same path without extension.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: check root and the names of the subfolders")
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        stem = file.name.removesuffix(ending := extension(file))
        if ending and stem.endswith(suffix) and not file.name.startswith("."):
            key = (file.relative_to(folder).parent / stem.removesuffix(suffix)).as_posix()
            if key in files:
                raise ValueError(f"{files[key]} and {file} have the same name: keep one of them")
            files[key] = file
    return files


def _separate(
    images: dict[str, Path], masks: dict[str, Path], image_suffix: str, mask_suffix: str
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Separate images and masks of one folder: the longer suffix marks one kind, the rest is the other."""
    if image_suffix == mask_suffix:
        raise ValueError("images and masks lie in the same folder: give mask_suffix to tell them apart")
    if len(mask_suffix) >= len(image_suffix):
        return _without(images, masks), masks
    return images, _without(masks, images)


def _without(files: dict[str, Path], others: dict[str, Path]) -> dict[str, Path]:
    """Return the files that are not among the others."""
    excluded = set(others.values())
    return {key: file for key, file in files.items() if file not in excluded}


def _with_folder(key: str, file: Path) -> str:
    """Return the name of a file, and the folder in which it is, if that is not the uppermost."""
    folder = Path(key).parent.as_posix()
    return file.name if folder == "." else f"{file.name} (in {folder})"


def _check_partners(
    files: Mapping[str, Path], partners: Mapping[str, Path], kind: str, partner_kind: str, argument: str
) -> None:
    """Raise ValueError if a file has no partner; ``argument`` is the one that may have to be set."""
    alone = sorted(_with_folder(key, file) for key, file in files.items() if key not in partners)
    if alone:
        names = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        raise ValueError(
            f"{len(alone)} of {len(files)} {kind} have no partner among the {len(partners)} {partner_kind}: "
            f"{names}; names must agree up to extension and suffix (set {argument}), or move these files away"
        )
