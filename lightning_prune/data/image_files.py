"""Images and masks as files: which belong together, and what is in them.

A mask is a palette image (its indices count), a greyscale or integer image (its values count), or, with a
`palette`, an image of colours.
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
    """Images with their masks, sorted by name.

    Args:
        images: folder of the images, searched with its subfolders.
        masks: folder of the masks; may be the same one if the suffixes differ.
        image_suffix: end of the images' names before the extension; other files are left alone.
        mask_suffix: likewise for the masks.
        unmasked: images may be without mask, and are left out.

    Raises:
        FileNotFoundError: if a folder or all images are missing.
        ValueError: for images without masks or the reverse, and for two images of the same name.
    """
    image_files = files_by_key(images, image_suffix)
    mask_files = files_by_key(masks, mask_suffix)
    if images == masks:
        image_files, mask_files = _apart(image_files, mask_files, image_suffix, mask_suffix)
    if not image_files:
        raise FileNotFoundError(f"no images {image_suffix}{{{','.join(EXTENSIONS)}}} in {images}")
    if unmasked:
        image_files = {key: file for key, file in image_files.items() if key in mask_files}
    _check_partners(image_files, mask_files, "images", f"masks in {masks}", "mask_suffix")
    _check_partners(mask_files, image_files, "masks", f"images in {images}", "image_suffix")
    return [Pair(image_files[key], mask_files[key]) for key in sorted(image_files)]


def read_image(file: Path, channels: int = 3) -> Tensor:
    """One image as ``(channels, h, w)`` float32; 8 and 16 bits become 0 to 1, floating point stays as it is.

    Raises:
        ValueError: if channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: images are read as 1 (grey) or 3 (colour)")
    with Image.open(file) as opened:
        if opened.mode.startswith(("I", "F")):
            return _deep(np.asarray(opened)).expand(channels, -1, -1).clone()
        pixels = np.array(opened.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1) / 255


def read_mask(file: Path, palette: Palette | None = None) -> Tensor:
    """One mask as ``(h, w)`` int64.

    Args:
        file: palette, greyscale, 1-bit or 16-bit image, or colours with ``palette``.
        palette: class of each colour; a colour is a tuple ``(255, 0, 0)`` or a string, ``"#ff0000"`` or
        ``"red"``.

    Raises:
        ValueError: for a colour without class, or colours without palette.
    """
    with Image.open(file) as opened:
        if palette is not None:
            return torch.from_numpy(_classes_of_colours(np.array(opened.convert("RGB")), palette, file))
        pixels = np.array(opened)
    if pixels.ndim == 3:
        pixels = _grey_saved_as_colour(pixels, file)
    if not np.issubdtype(pixels.dtype, np.integer) and pixels.dtype != bool:
        raise ValueError(f"{file} has values of type {pixels.dtype}: a mask needs whole numbers")
    return torch.from_numpy(pixels.astype(np.int64))


def files_by_key(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Files whose stem ends with ``suffix``, by their path below the folder without it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: check root and the names of the subfolders")
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in EXTENSIONS and file.stem.endswith(suffix) and not file.name.startswith("."):
            key = file.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
            if key in found:
                raise ValueError(f"{found[key]} and {file} have the same name: keep one of them")
            found[key] = file
    return found


def _apart(
    images: dict[str, Path], masks: dict[str, Path], image_suffix: str, mask_suffix: str
) -> tuple[dict[str, Path], dict[str, Path]]:
    """In one folder for both, the longer suffix says which of the two a file is."""
    if image_suffix == mask_suffix:
        raise ValueError("images and masks lie in the same folder: give mask_suffix to tell them apart")
    longer, shorter = (masks, images) if len(mask_suffix) >= len(image_suffix) else (images, masks)
    taken = set(longer.values())
    rest = {key: file for key, file in shorter.items() if file not in taken}
    return (rest, longer) if longer is masks else (longer, rest)


def _check_partners(
    ours: Mapping[str, Path], theirs: Mapping[str, Path], us: str, them: str, way: str
) -> None:
    alone = sorted(file.name for key, file in ours.items() if key not in theirs)
    if alone:
        names = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        raise ValueError(
            f"{len(alone)} of {len(ours)} {us} have no partner among the {len(theirs)} {them}: {names}; "
            f"names must agree up to extension and suffix (set {way}), or move these files away"
        )


def _deep(pixels: NDArray[np.generic]) -> Tensor:
    """More than 8 bits: ``(h, w)`` whole numbers are taken for 16 bits."""
    scale = 65535 if np.issubdtype(pixels.dtype, np.integer) else 1
    return torch.from_numpy(pixels.astype(np.float32) / scale)


def _classes_of_colours(pixels: NDArray[np.uint8], palette: Palette, file: Path) -> NDArray[np.int64]:
    """``(h, w, 3)`` to ``(h, w)``, by looking up each colour as one number."""
    numbers = _as_number(pixels)
    classes = {int(_as_number(np.array(_rgb(colour)))): number for colour, number in palette.items()}
    found, where = np.unique(numbers, return_inverse=True)
    unknown = [int(number) for number in found if int(number) not in classes]
    if unknown:
        names = ", ".join(f"#{number:06x}" for number in unknown[:3])
        raise ValueError(
            f"{file} has {len(unknown)} colours without class, {names} among them: add to palette"
        )
    return np.array([classes[int(number)] for number in found], dtype=np.int64)[where].reshape(numbers.shape)


def _rgb(colour: Colour) -> Sequence[int]:
    return ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else colour


def _as_number(pixels: NDArray[np.generic]) -> NDArray[np.int64]:
    return pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _grey_saved_as_colour(pixels: NDArray[np.uint8], file: Path) -> NDArray[np.uint8]:
    """The first channel, if all three are equal; alpha is left out."""
    if pixels.shape[2] >= 3 and (pixels[..., :3] != pixels[..., :1]).any():
        raise ValueError(f"{file} has colours: give palette={{colour: class, ...}}")
    return pixels[..., 0]
