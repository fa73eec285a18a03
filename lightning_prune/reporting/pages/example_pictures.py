"""Example images with masks or probabilities, dense and pruned side by side, as pictures that stand in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_prune.reporting.examples import Examples

__all__ = ["gallery"]

#: of the classes from 1 on, after Okabe and Ito; class 0, mostly the background, is left as it is
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
DIFFERENT, IGNORED = (255, 40, 80), (120, 120, 120)
OPACITY = 0.55
SMALL = 200  # pixels of a side; smaller pictures are enlarged with sharp edges
TOP = 3  # classes of an image that are listed
NAMES = {"dense": "dense network", "final": "pruned network"}

Pixels = NDArray[np.uint8]


def gallery(examples: Examples, pruned: bool = True) -> dict[str, Any]:
    """Return the pictures of a page: a text, a legend, and a row for each image, the most different ones first.

    Args:
        examples: images with outputs.
        pruned: whether the final network is a pruned one.
    """
    names = dict(NAMES) if pruned else {"final": "prediction"}
    if examples.dense_epoch is not None:
        names["dense"] = f"dense, epoch {examples.dense_epoch}"
    rows = _mask_rows if examples.is_segmentation else _guess_rows
    order = sorted(range(len(examples.images)), key=lambda number: -_distance(examples, number))
    legend = _legend(examples) if examples.is_segmentation else []
    return {
        "intro": _intro(examples, pruned),
        "legend": legend,
        "rows": [rows(examples, n, names) for n in order],
    }


def _intro(examples: Examples, pruned: bool) -> str:
    chosen = "Images of the validation set, chosen by their labels alone"
    if "dense" not in examples.outputs:
        return f"{chosen}." + (" No dense network is there to compare with." if pruned else "")
    what = "that of the dense run"
    if (epoch := examples.dense_epoch) is not None:
        what = f"this run's own, right before its first cut after {epoch} epoch{'s' * (epoch != 1)} of training, "
        what += "so that a part of the difference is what training has added since"
    return f"{chosen}; those on which both networks differ most come first. The dense network is {what}."


def _distance(examples: Examples, number: int) -> float:
    """Return how much the outputs of both networks differ on an image."""
    if not {"dense", "final"} <= examples.outputs.keys():
        return 0.0
    dense, final = (examples.outputs[name][number] for name in ("dense", "final"))
    if examples.is_segmentation:
        return float((dense != final).mean())
    return float(np.abs(dense - final).sum())


def _legend(examples: Examples) -> list[tuple[str, str]]:
    present = {
        int(each)
        for group in (examples.targets, *examples.outputs.values())
        for mask in group
        for each in np.unique(mask)
    }
    rows = [(name, _css(_colour(n))) for n, name in enumerate(examples.classes) if n and n in present]
    plain = [(f"{examples.classes[0]} (not coloured)", "transparent")] if 0 in present else []
    different = [("both networks differ", _css(DIFFERENT))] if "dense" in examples.outputs else []
    ignored = [("not counted", _css(IGNORED))] if examples.ignore_index in present else []
    return [*plain, *rows, *ignored, *different]


def _css(colour: Sequence[int]) -> str:
    return "rgb({}, {}, {})".format(*colour)


def _colour(number: int) -> tuple[int, int, int]:
    """Return the colour of a class; with more classes than colours, darker ones follow."""
    place, turn = (number - 1) % len(COLOURS), (number - 1) // len(COLOURS)
    red, green, blue = (round(part / (1 + 0.6 * turn)) for part in COLOURS[place])
    return red, green, blue


def _mask_rows(examples: Examples, number: int, names: dict[str, str]) -> dict[str, Any]:
    """Return image, label, the masks of both networks, and where they differ."""
    image, target = examples.images[number], examples.targets[number]
    pictures = [_picture(_rgb(image), "image", f"no. {examples.numbers[number]}" if examples.numbers else "")]
    pictures.append(_picture(_overlay(image, target, examples.ignore_index), "label"))
    for name, title in names.items():
        if name in examples.outputs:
            mask = examples.outputs[name][number]
            right = _agreement(mask, target, examples.ignore_index)
            pictures.append(_picture(_overlay(image, mask), title, f"{right:.1%} right"))
    if {"dense", "final"} <= examples.outputs.keys():
        different = examples.outputs["dense"][number] != examples.outputs["final"][number]
        pictures.append(
            _picture(_marked(image, different), "difference", f"{different.mean():.1%} of the pixels")
        )
    return {"pictures": pictures, "predictions": []}


def _agreement(mask: NDArray[Any], target: NDArray[Any], ignore_index: int | None) -> float:
    """Return the share of the pixels that count whose class is right; NaN if none counts."""
    counted = np.ones_like(target, dtype=bool) if ignore_index is None else target != ignore_index
    return float((mask == target)[counted].mean()) if counted.any() else float("nan")


def _guess_rows(examples: Examples, number: int, names: dict[str, str]) -> dict[str, Any]:
    """Return the image, and the most probable classes by each network."""
    target = int(examples.targets[number])
    known = target if 0 <= target < len(examples.classes) else None
    title = str(target) if known is None else examples.classes[target]
    pictures = [_picture(_rgb(examples.images[number]), title, "is its label")]
    guesses = [
        {"title": text, "bars": _bars(examples.outputs[name][number], examples.classes, known)}
        for name, text in names.items()
        if name in examples.outputs
    ]
    return {"pictures": pictures, "predictions": guesses}


def _bars(
    probabilities: NDArray[Any], classes: Sequence[str], target: int | None
) -> list[tuple[str, str, bool]]:
    top = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    return [(classes[each], f"{100 * float(probabilities[each]):.0f}", each == target) for each in top]


def _rgb(image: Pixels) -> Pixels:
    return np.stack([image] * 3, axis=-1) if image.ndim == 2 else image


def _overlay(image: Pixels, mask: NDArray[Any], ignore_index: int | None = None) -> Pixels:
    """Return the image with each class but 0 in its colour."""
    colours = _rgb(image).astype(np.float64)
    for each in np.unique(mask).tolist():
        if each == 0 and each != ignore_index:
            continue
        colour = IGNORED if each == ignore_index or each < 0 else _colour(each)
        inside = mask == each
        colours[inside] = (1 - OPACITY) * colours[inside] + OPACITY * np.array(colour)
    return colours.round().astype(np.uint8)


def _marked(image: Pixels, where: NDArray[np.bool_]) -> Pixels:
    """Return the darkened image with some pixels in one strong colour."""
    grey = _rgb(image).mean(axis=-1, keepdims=True).repeat(3, axis=-1) * 0.5
    grey[where] = DIFFERENT
    return grey.round().astype(np.uint8)


def _picture(pixels: Pixels, title: str, note: str = "") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", quality=88, method=4)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"source": source, "title": title, "note": note, "small": max(pixels.shape) < SMALL}
