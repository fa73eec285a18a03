"""Reading of images and masks from files, and pairing of their names.

The class numbers of a mask are the indices of a palette image, the values of a greyscale or integer image, or, with a
`palette`, the classes of the colours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

Colour = str | tuple[int, int, int]
Palette = Mapping[Colour, int]


class Pair(NamedTuple):
    """The files of one sample."""

    image: Path
    mask: Path


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


def read_image(file: Path, channels: int = 3) -> Tensor:
    """Read an image as ``(channels, h, w)`` float32, scaled to 0 to 1 unless the file has floating point values.

    Args:
        file: image of 8 or 16 bits or of floating point.
        channels: 1 for grey or 3 for colour.

    Raises:
        ValueError: channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: images are read as 1 (grey) or 3 (colour)")
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):
            return _read_deep(np.asarray(opened)).expand(channels, -1, -1).clone()
        pixels = np.array(opened.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1) / 255


def read_mask(file: Path, palette: Palette | None = None) -> Tensor:
    """Read a mask as class numbers ``(h, w)`` int64.

    Args:
        file: palette, greyscale, 1-bit or 16-bit image; with ``palette`` an image of colours.
        palette: class of each colour; a colour is a tuple ``(255, 0, 0)`` or a string, ``"#ff0000"`` or
            ``"red"``.

    Raises:
        ValueError: a colour has no class, the file has colours and there is no palette, or values are not whole
            numbers.
    """
    with Image.open(file) as opened:
        if palette is not None:
            return torch.from_numpy(_classes_of_colours(np.array(opened.convert("RGB")), palette, file))
        pixels = np.array(opened)
    if pixels.ndim == 3:
        pixels = _single_channel(pixels, file)
    if not np.issubdtype(pixels.dtype, np.integer) and pixels.dtype != bool:
        raise ValueError(f"{file} has values of type {pixels.dtype}: a mask needs whole numbers")
    return torch.from_numpy(pixels.astype(np.int64))


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
        if file.suffix.lower() in EXTENSIONS and file.stem.endswith(suffix) and not file.name.startswith("."):
            key = file.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
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


def _check_partners(
    files: Mapping[str, Path], partners: Mapping[str, Path], kind: str, partner_kind: str, argument: str
) -> None:
    """Raise ValueError if a file has no partner; ``argument`` is the one that may have to be set."""
    alone = sorted(file.name for key, file in files.items() if key not in partners)
    if alone:
        names = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        raise ValueError(
            f"{len(alone)} of {len(files)} {kind} have no partner among the {len(partners)} {partner_kind}: "
            f"{names}; names must agree up to extension and suffix (set {argument}), or move these files away"
        )


def _read_deep(pixels: NDArray[np.generic]) -> Tensor:
    """Scale pixels ``(h, w)`` of 16 bits to 0 to 1; floating point pixels are not scaled."""
    scale = 65535 if np.issubdtype(pixels.dtype, np.integer) else 1
    return torch.from_numpy(pixels.astype(np.float32) / scale)


def _classes_of_colours(pixels: NDArray[np.uint8], palette: Palette, file: Path) -> NDArray[np.int64]:
    """Map colours ``(h, w, 3)`` to class numbers ``(h, w)``."""
    numbers = _as_number(pixels)
    classes = {int(_as_number(np.array(_rgb(colour)))): number for colour, number in palette.items()}
    colours, where = np.unique(numbers, return_inverse=True)
    unknown = [int(number) for number in colours if int(number) not in classes]
    if unknown:
        names = ", ".join(f"#{number:06x}" for number in unknown[:3])
        raise ValueError(
            f"{file} has {len(unknown)} colours without class, {names} among them: add to palette"
        )
    lookup = np.array([classes[int(number)] for number in colours], dtype=np.int64)
    return lookup[where].reshape(numbers.shape)


def _rgb(colour: Colour) -> Sequence[int]:
    return ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else colour


def _as_number(pixels: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return each colour ``(..., 3)`` as one number ``0xrrggbb``."""
    return pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _single_channel(pixels: NDArray[np.uint8], file: Path) -> NDArray[np.uint8]:
    """Return the first channel of a grey image saved as colour; raise if channels other than alpha differ."""
    if pixels.shape[2] >= 3 and (pixels[..., :3] != pixels[..., :1]).any():
        raise ValueError(f"{file} has colours: give palette={{colour: class, ...}}")
    return pixels[..., 0]
