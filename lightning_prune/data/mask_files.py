"""Reading of masks: which class each stored number or colour means.

Without a `palette`, the numbers in a file are class numbers: the values of a grey image, or the indices of a palette
image. `lightning_prune.data.mask_survey` looks at the masks of a folder, and chooses another coding where these are
no class numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageColor
from torch import Tensor

from lightning_prune.data.readers import read_colours, read_values

__all__ = ["MaskCoding", "Palette", "as_number", "coding_of", "colour_name", "read_mask"]

Colour = str | tuple[int, int, int]
#: class of each colour or of each stored number; of a list, the colours of the classes 0, 1, ...
Palette = Mapping[Any, int] | Sequence[Colour]


@dataclass(frozen=True)
class MaskCoding:
    """Which class each stored number or colour of a mask means.

    Attributes:
        colours: ``0xrrggbb`` -> class; None: the numbers are read, not the colours.
        values: number -> class. Others stay as they are unless ``strict``.
        strict: whether a number without class is an error.
        threshold: smallest number of class 1; the smaller ones are class 0.
        text: how the masks are read, for people; empty for class numbers.
    """

    colours: Mapping[int, int] | None = None
    values: Mapping[int, int] | None = None
    strict: bool = False
    threshold: int | None = None
    text: str = ""

    def read(self, file: Path, index: int = 0) -> Tensor:
        """Return the class numbers ``(h, w)`` int64 of a mask.

        Raises:
            ValueError: a colour or number has no class, or the file cannot be read.
        """
        if self.colours is not None:
            return torch.from_numpy(_classes_of_colours(read_colours(file, index), self.colours, file))
        numbers = whole_numbers(read_values(file, index), file)
        if self.threshold is not None:
            numbers = (numbers >= self.threshold).astype(np.int64)
        if self.values is not None:
            numbers = _mapped(numbers, self.values, self.strict, file)
        return torch.from_numpy(numbers)


def read_mask(file: Path, palette: Palette | None = None, index: int = 0) -> Tensor:
    """Read a mask as class numbers ``(h, w)`` int64.

    Args:
        file: palette, grey, 1-bit or 16-bit image; with a ``palette`` of colours an image of colours.
        palette: see :func:`coding_of`.
        index: which image of a file with several.

    Raises:
        ValueError: a colour has no class, the file has colours and there is no palette, values are not whole
            numbers, or the file cannot be read.
    """
    return coding_of(palette).read(file, index)


def coding_of(palette: Palette | None) -> MaskCoding:
    """Return the coding that a palette describes.

    Args:
        palette: class of each colour, ``{(255, 0, 0): 1}``, ``{"#ff0000": 1}`` or ``{"red": 1}``; class of each
            stored number, ``{255: 1}``, where other numbers stay; or the colours of the classes 0, 1, ... as a list.
            None: the stored numbers are class numbers.

    Raises:
        ValueError: the palette mixes colours and numbers, or a colour is unknown.

    Example:
        >>> coding_of({255: 1}).values, coding_of(["black", "#ff0000"]).colours
        ({255: 1}, {0: 0, 16711680: 1})
    """
    if palette is None:
        return MaskCoding()
    if not isinstance(palette, Mapping):
        palette = {_hashable(colour): number for number, colour in enumerate(palette)}
    numbers = {key: value for key, value in palette.items() if isinstance(key, int)}
    if numbers and len(numbers) < len(palette):
        raise ValueError(f"palette={_written(palette)} mixes colours and numbers: give one kind")
    if numbers:
        return MaskCoding(values=numbers)
    return MaskCoding(colours={_colour_number(key): value for key, value in palette.items()})


def as_number(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """Return each colour ``(..., 3)`` as one number ``0xrrggbb``."""
    return pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def colour_name(number: int) -> str:
    """Return the text, such as ``#ff0000``, by which a palette names a colour given as a number.

    Example:
        >>> colour_name(0xFF0080)
        '#ff0080'
    """
    return f"#{number:06x}"


def whole_numbers(values: NDArray[Any], file: Path) -> NDArray[np.int64]:
    """Return the stored numbers of a mask ``(h, w)`` as int64.

    Raises:
        ValueError: they are fractions, or the file has colours.
    """
    if values.ndim == 3:
        if has_colours(values):
            raise ValueError(f"{file} has colours: give palette={{colour: class, ...}}")
        values = values[..., 0]
    numbers = values.astype(np.int64)
    if not np.issubdtype(values.dtype, np.integer) and values.dtype != bool and (numbers != values).any():
        raise ValueError(f"{file} has values of type {values.dtype}: a mask needs whole numbers")
    return numbers


def has_colours(values: NDArray[Any]) -> bool:
    """Whether channels other than alpha differ."""
    return values.ndim == 3 and values.shape[2] >= 3 and bool((values[..., :3] != values[..., :1]).any())


def _written(palette: Mapping[Any, Any]) -> str:
    """Return a palette as a command line takes it."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in palette.items())}}}"


def _mapped(
    numbers: NDArray[np.int64], classes: Mapping[int, int], strict: bool, file: Path
) -> NDArray[np.int64]:
    found, where = np.unique(numbers, return_inverse=True)
    unknown = [int(number) for number in found if int(number) not in classes]
    if strict and unknown:
        raise ValueError(
            f"{file} has the value {unknown[0]}, which the masks that were looked at first have not: "
            f"give palette={{value: class, ...}}; so far {_written(classes)}"
        )
    lookup = np.array([classes.get(int(number), int(number)) for number in found], dtype=np.int64)
    return lookup[where].reshape(numbers.shape)


def _classes_of_colours(pixels: NDArray[Any], classes: Mapping[int, int], file: Path) -> NDArray[np.int64]:
    """Map colours ``(h, w, 3)`` to class numbers ``(h, w)``."""
    numbers = as_number(pixels)
    colours, where = np.unique(numbers, return_inverse=True)
    unknown = [int(number) for number in colours if int(number) not in classes]
    if unknown:
        names = ", ".join(map(colour_name, unknown[:3]))
        raise ValueError(
            f"{file} has {len(unknown)} colours without class, {names} among them: add to palette"
        )
    lookup = np.array([classes[int(number)] for number in colours], dtype=np.int64)
    return lookup[where].reshape(numbers.shape)


def _hashable(colour: Any) -> Any:
    return tuple(colour) if isinstance(colour, list) else colour


def _colour_number(colour: Any) -> int:
    """Return a colour as ``0xrrggbb``; on a command line it may lack the ``#``."""
    if not isinstance(colour, str):
        return int(as_number(np.array(colour)))
    hexadecimal = len(colour) == 6 and all(letter in "0123456789abcdefABCDEF" for letter in colour)
    return int(as_number(np.array(ImageColor.getrgb(f"#{colour}" if hexadecimal else colour)[:3])))
