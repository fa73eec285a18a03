"""Look at the masks of a data set, to know what the numbers and colours in them mean.

Understood are class numbers; 0 and 255 (or soft values between them, as JPEG leaves) as two classes; 1 to n as n
classes; n grey levels that are equally spaced from 0 to 255; white or any other one colour on black; and the
colours of PASCAL VOC. Everything else is an error that says what was found, and which `palette` to give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_prune.data.mask_files import (
    MaskCoding,
    as_number,
    colour_name,
    has_colours,
    whole_numbers,
)
from lightning_prune.data.readers import num_slices, read_colours, read_values

__all__ = ["Survey", "survey", "understand"]

MAX_FILES = 200  # files that are looked at, spread over all of them
MANY = 1 << 16
FEW = 12  # values that an error message lists
VOID_OF_VOC = 0xE0E0C0


@dataclass
class Survey:
    """The numbers, colours and palettes found in the masks of a data set.

    Attributes:
        num_files: number of masks that were looked at.
        values: stored number -> number of pixels, of masks without colours.
        colours: ``0xrrggbb`` -> number of pixels, of masks with colours; empty if there are none.
        example: stored number or colour -> a file that has it.
        indexed: whether the masks are palette images whose indices agree.
    """

    num_files: int = 0
    values: Counter[int] = field(default_factory=Counter)
    colours: Counter[int] = field(default_factory=Counter)
    example: dict[int, Path] = field(default_factory=dict)
    indexed: bool = False


def survey(files: Sequence[Path]) -> Survey:
    """Look at masks: at all if there are at most 200, else at 200 that are spread evenly.

    Raises:
        ValueError: a file cannot be read, or has fractions.
    """
    chosen = [
        files[n] for n in np.linspace(0, len(files) - 1, min(len(files), MAX_FILES)).round().astype(int)
    ]
    palettes = [_palette_of(file) for file in chosen]
    found = Survey(len(chosen), indexed=bool(chosen) and all(palettes))
    by_colour = _differ(palettes) or any(map(_is_coloured, chosen))
    for file in chosen:
        counts = _colours_in(file) if by_colour else _values_in(file)
        (found.colours if by_colour else found.values).update(counts)
        for key in counts:
            found.example.setdefault(key, file)
    return found


def understand(found: Survey, num_classes: int, ignore_index: int | None = None) -> MaskCoding:
    """Choose how to read masks.

    Args:
        found: what the masks contain.
        num_classes: class numbers are ``0 .. num_classes - 1``.
        ignore_index: class number of pixels without class.

    Raises:
        ValueError: the masks contain anything else; the message says what, and what to give.

    Example:
        >>> understand(Survey(20, Counter({0: 900, 255: 100})), num_classes=2).text
        '0 and 255 are read as classes 0 and 1'
        >>> understand(Survey(20, Counter({1: 900, 2: 50, 3: 50})), num_classes=3).values
        {1: 0, 2: 1, 3: 2}
    """
    if found.colours:
        return _of_colours(found, num_classes, ignore_index)
    void = set() if ignore_index is None else {ignore_index}
    values = sorted(found.values.keys() - void)
    if not values or (values[0] >= 0 and values[-1] < num_classes):
        text = "indices of the palette are class numbers" if found.indexed else ""
        return MaskCoding(text=text)
    if num_classes == 2 and set(values) <= {0, 255}:
        return MaskCoding(values={255: 1}, text="0 and 255 are read as classes 0 and 1")
    if num_classes == 2 and not void and _is_soft(found.values):
        text = "values from 0 to 255, nearly all close to an end: 128 and more are read as class 1"
        return MaskCoding(threshold=128, text=text)
    if values == list(range(1, num_classes + 1)):
        text = f"1 to {num_classes} are read as classes 0 to {num_classes - 1}"
        return _strict(values, void, text)
    if len(values) == num_classes > 2 and _are_equally_spaced(values):
        levels = ", ".join(map(str, values))
        return _strict(values, void, f"grey levels {levels} are read as classes 0 to {num_classes - 1}")
    raise ValueError(_numbers_message(found, values, num_classes))


def _strict(values: Sequence[int], void: set[int], text: str) -> MaskCoding:
    classes = {value: number for number, value in enumerate(values)}
    return MaskCoding(values=classes | {value: value for value in void}, strict=True, text=text)


def _is_soft(values: Mapping[int, int]) -> bool:
    """Whether values spread from 0 to 255, and nearly all pixels are close to one of both ends."""
    if min(values) < 0 or max(values) > 255 or len(values) <= 4 or max(values) < 240:
        return False
    ends = sum(number for value, number in values.items() if value < 16 or value >= 240)
    return ends >= 0.9 * sum(values.values())


def _are_equally_spaced(values: Sequence[int]) -> bool:
    steps = np.diff(values)
    return values[0] == 0 and 240 <= values[-1] <= 255 and int(steps.max() - steps.min()) <= 1


def _of_colours(found: Survey, num_classes: int, ignore_index: int | None) -> MaskCoding:
    colours = set(found.colours)
    voc = {colour: number for number, colour in enumerate(voc_colours(num_classes))}
    if ignore_index is not None:
        voc[VOID_OF_VOC] = ignore_index
    names = ", ".join(map(colour_name, sorted(colours)[:FEW]))
    if num_classes == 2 and 0 in colours and len(colours) == 2:
        other = max(colours)
        return MaskCoding(
            colours={0: 0, other: 1}, text=f"black and {colour_name(other)} are classes 0 and 1"
        )
    if colours <= voc.keys():
        return MaskCoding(colours=voc, text=f"colours of PASCAL VOC ({names}) are read as its classes")
    raise ValueError(_colours_message(found, num_classes, names))


def voc_colours(number: int) -> list[int]:
    """Return the colours of the classes of PASCAL VOC, as its development kit computes them.

    Example:
        >>> [colour_name(colour) for colour in voc_colours(3)]
        ['#000000', '#800000', '#008000']
    """
    colours = []
    for index in range(number):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append(int(as_number(np.array(channels))))
    return colours


def _numbers_message(found: Survey, values: Sequence[int], num_classes: int) -> str:
    allowed = f"num_classes={num_classes} allows 0 to {num_classes - 1}"
    wrong = next(value for value in reversed(values) if not 0 <= value < num_classes)
    listed = ", ".join(map(str, values[:FEW])) + (", ..." if len(values) > FEW else "")
    inside = [value for value in values if 0 <= value < num_classes]
    if set(values) - set(inside) == {255}:
        advice = (
            "if 255 marks pixels without class, give ignore_index=255 (on the command line task.ignore_index=255), "
            f"else its class: palette={{255: {min(len(inside), num_classes - 1)}}}"
        )
    elif len(values) > 4 * num_classes and len(values) > 16:
        advice = "so many values are no classes; are these the masks, saved without loss (PNG, not JPEG)?"
    else:
        advice = (
            f"raise num_classes, pass ignore_index={wrong} if these pixels have no class, or say what the values "
            f"mean: palette={{{', '.join(f'{value}: {n}' for n, value in enumerate(values[:num_classes]))}}}"
        )
    file = found.example.get(wrong, "a mask")
    return f"{file} has class number {wrong}, but {allowed}; masks have {listed}: {advice}"


def _colours_message(found: Survey, num_classes: int, names: str) -> str:
    common = sorted(colour for colour, _ in found.colours.most_common(num_classes))
    entries = ", ".join(f'"{colour_name(colour)}": {number}' for number, colour in enumerate(common))
    words = ",".join(f'"{colour_name(colour)}"' for colour in common)
    more = len(found.colours) - num_classes
    extra = f" ({more} more than num_classes={num_classes})" if more > 0 else ""
    file = found.example[max(found.colours)]
    return (
        f"the masks have {len(found.colours)} colours{extra}, such as in {file}: {names}; "
        f"say what they mean, in the order of your classes: palette={{{entries}}}, "
        f"or on the command line 'data.palette=[{words}]'"
    )


def _palette_of(file: Path) -> dict[int, tuple[int, ...]]:
    """Return the colours of the indices that a palette image uses; empty for other images."""
    try:
        with Image.open(file) as opened:
            if opened.mode != "P":
                return {}
            palette = opened.getpalette() or []
            used = np.flatnonzero(opened.histogram()[:256])
            return {int(n): tuple(palette[3 * n : 3 * n + 3]) for n in used}
    except Exception:  # `read_values` raises, with the name of the file
        return {}


def _differ(palettes: Sequence[Mapping[int, tuple[int, ...]]]) -> bool:
    """Whether an index has another colour in another file: programs that reduce colours choose a palette per file."""
    entries = {entry for palette in palettes for entry in palette.items()}
    return len(entries) > len({index for index, _ in entries})


def _is_coloured(file: Path) -> bool:
    return any(has_colours(read_values(file, index)) for index in range(num_slices(file)))


def _values_in(file: Path) -> Counter[int]:
    counts: Counter[int] = Counter()
    for index in range(num_slices(file)):
        counts.update(_counted(whole_numbers(read_values(file, index), file)))
    return counts


def _colours_in(file: Path) -> Counter[int]:
    counts: Counter[int] = Counter()
    for index in range(num_slices(file)):
        counts.update(_counted(as_number(read_colours(file, index))))
    return counts


def _counted(numbers: NDArray[Any]) -> dict[int, int]:
    if numbers.size and numbers.min() >= 0 and numbers.max() < MANY:  # ten times as fast as sorting
        counts = np.bincount(numbers.ravel())
        return {int(number): int(counts[number]) for number in np.flatnonzero(counts)}
    found, counts = np.unique(numbers, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
