"""Example images with what the dense and the pruned network make of them, kept in ``examples.npz`` of a run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.modules import (
    drop_caches_,
    floating_dtype,
    training_modes,
    without_forward_hooks,
)
from lightning_prune.utils.seeding import seeded

__all__ = ["EXAMPLES", "Examples", "NoExamples", "choose", "predict"]

EXAMPLES = "examples.npz"
COUNT = 6  # images that are shown
CANDIDATES = 24  # images that are read to choose from
SIDE = 320  # pixels of the longer side; larger images are made smaller


class NoExamples(ValueError):
    """There are no images to show; the text says why."""


@dataclass(frozen=True)
class Examples:
    """A few images with their targets and with the outputs of networks.

    Attributes:
        images: ``(h, w)`` or ``(h, w, 3)`` each, uint8; sizes may differ.
        targets: masks ``(h, w)``, or class numbers ``()``.
        outputs: ``"dense"`` and ``"final"`` -> for each image a mask ``(h, w)``, or the probability of each class.
        classes: their names.
        ignore_index: class number of pixels that do not count.
        dense_epoch: number of trained epochs of the dense network, if it is that of the run before its first cut.
        numbers: of the images in their data set.
    """

    images: Sequence[NDArray[np.uint8]]
    targets: Sequence[NDArray[np.int64]]
    outputs: Mapping[str, Sequence[NDArray[Any]]] = field(default_factory=dict)
    classes: Sequence[str] = ()
    ignore_index: int | None = None
    dense_epoch: int | None = None
    numbers: Sequence[int] = ()

    @property
    def is_segmentation(self) -> bool:
        """Whether the targets are masks."""
        return self.targets[0].ndim == 2

    def shows_same_images(self, other: Examples) -> bool:
        """Return whether both are of the same images, so that outputs of one can stand beside those of the other."""
        return len(self.images) == len(other.images) and all(map(np.array_equal, self.images, other.images))

    def with_dense(self, outputs: Sequence[NDArray[Any]], epoch: int | None = None) -> Examples:
        """Return a copy with the outputs of a dense network."""
        return replace(self, outputs={"dense": outputs, **_without(self.outputs, "dense")}, dense_epoch=epoch)

    def save(self, folder: Path) -> None:
        """Write ``examples.npz``: arrays, and one text with everything else."""
        groups: dict[str, Sequence[NDArray[Any]]] = {
            "image": self.images,
            "target": self.targets,
            **self.outputs,
        }
        arrays = {f"{name}/{n}": array for name, group in groups.items() for n, array in enumerate(group)}
        facts: dict[str, Any] = {"classes": [*self.classes], "ignore_index": self.ignore_index}
        facts |= {"count": len(self.images), "outputs": [*self.outputs]}
        facts |= {"dense_epoch": self.dense_epoch, "numbers": [*self.numbers]}
        with atomic_write(folder / EXAMPLES) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> Examples:
        """Read ``examples.npz`` in the folder of a run.

        Raises:
            NoExamples: there is no such file, or it is damaged.
        """
        try:
            with np.load(folder / EXAMPLES, allow_pickle=False) as arrays:
                return _examples_from(arrays)
        except FileNotFoundError as error:
            raise NoExamples(f"the run has no {EXAMPLES}") from error
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise NoExamples(f"{EXAMPLES} is damaged: {error}") from error


def _examples_from(arrays: Mapping[str, NDArray[Any]]) -> Examples:
    facts = json.loads(str(arrays["facts"]))
    groups = {
        name: [arrays[f"{name}/{number}"] for number in range(facts["count"])]
        for name in ("image", "target", *facts["outputs"])
    }
    if not groups["image"]:
        raise ValueError("it holds no image")
    outputs = {name: groups[name] for name in facts["outputs"]}
    others = {name: facts[name] for name in ("classes", "ignore_index", "dense_epoch", "numbers")}
    return Examples(groups["image"], groups["target"], outputs, **others)


def _without(outputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in outputs.items() if key != name}


def choose(samples: Any, count: int = COUNT) -> list[int]:
    """Return the numbers of images to show: of some that are evenly spaced, those with the most classes.

    The choice depends on the targets alone, so that it favours no network.

    Args:
        samples: data set whose samples are (image, target, ...).
        count: number of images.

    Raises:
        NoExamples: the samples cannot be read by index, or are of another form.

    Example:
        >>> plain, rich = torch.zeros(2, 2).long(), torch.tensor([[0, 1], [1, 2]])
        >>> choose([(torch.zeros(1, 2, 2), mask) for mask in (plain, rich, plain)], count=1)
        [1]
    """
    if not hasattr(samples, "__getitem__") or not hasattr(samples, "__len__") or not len(samples):
        raise NoExamples("its validation data cannot be read image by image")
    numbers = sorted({int(number) for number in np.linspace(0, len(samples) - 1, CANDIDATES).round()})
    with seeded(0):
        targets = {number: _sample(samples, number)[1] for number in numbers}
    if targets[numbers[0]].ndim == 0:
        # Class numbers say nothing of an image; as many different classes as possible.
        seen: dict[int, int] = {}
        for number, target in targets.items():
            seen.setdefault(int(target), number)
        first = list(seen.values())
        return sorted([*first, *(number for number in numbers if number not in first)][:count])
    # The richest of each part of the data, since neighbours are often alike.
    parts = np.array_split(np.array(numbers), min(count, len(numbers)))
    return [max(part.tolist(), key=lambda number: len(targets[number].unique())) for part in parts]


def _sample(samples: Any, number: int) -> tuple[Tensor, Tensor]:
    """Return image (c, h, w) and target of one sample."""
    sample = samples[number]
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        raise NoExamples("its samples are not (image, target)")
    image, target = torch.as_tensor(sample[0]), torch.as_tensor(sample[1])
    if image.ndim != 3 or target.ndim not in (0, 2):
        raise NoExamples(
            f"its samples are not images (c, h, w) with masks (h, w) or class numbers, but "
            f"{tuple(image.shape)} with {tuple(target.shape)}"
        )
    return image, target


def predict(
    module: nn.Module, samples: Any, numbers: Sequence[int], name: str, classes: Sequence[str] = ()
) -> Examples:
    """Return images with the outputs of a network, computed one by one: their sizes may differ.

    The network is in eval mode meanwhile; hooks, modes and random generators are left as they are.

    Args:
        module: maps images ``(1, c, h, w)`` to logits ``(1, classes, ...)``.
        samples: data set of (image, target, ...).
        numbers: of the images.
        name: of the outputs, ``"dense"`` or ``"final"``.
        classes: their names; empty: their numbers.

    Raises:
        NoExamples: the output is no tensor of logits.

    Example:
        >>> samples = [(torch.rand(1, 4, 6), torch.zeros(4, 6).long())]
        >>> predict(nn.Conv2d(1, 2, 1), samples, [0], "final").outputs["final"][0].shape
        (4, 6)
    """
    with seeded(0):
        pairs = [_sample(samples, number) for number in numbers]
        outputs = _outputs(module, [image for image, _ in pairs])
    targets = [_small(target) if target.ndim == 2 else target for _, target in pairs]
    logits = outputs[0].shape[0]
    return Examples(
        [_pixels(image) for image, _ in pairs],
        [target.to(torch.int64).cpu().numpy() for target in targets],
        {name: [_readable(output) for output in outputs]},
        list(classes) if len(classes) == logits else [str(number) for number in range(logits)],
        getattr(module, "ignore_index", None),
        numbers=list(numbers),
    )


def _outputs(module: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of each image, without the batch dimension."""
    first = next(module.parameters(), torch.zeros(()))
    dtype = floating_dtype(module.parameters()) or torch.float32
    try:
        with torch.no_grad(), without_forward_hooks(module), training_modes(module, lambda _: False):
            outputs = [module(image.to(first.device, dtype)[None]) for image in images]
    finally:
        drop_caches_(
            module
        )  # what a network computes of its weights in eval mode, it must compute again later
    for output, image in zip(outputs, images, strict=True):
        if not isinstance(output, Tensor) or output.shape[2:] not in (image.shape[1:], ()) or output.ndim < 2:
            raise NoExamples("its network returns no logits (n, classes, ...) for an image")
    return [output[0].float().cpu() for output in outputs]


def _readable(logits: Tensor) -> NDArray[Any]:
    """Return the class of each pixel, or the probability of each class of an image."""
    if logits.ndim == 1:
        return logits.softmax(0).numpy().astype(np.float32)
    return _small(logits.argmax(0)).numpy().astype(np.int16)


def _small(mask: Tensor) -> Tensor:
    """Return a mask of at most ``SIDE`` pixels a side, by its nearest pixels."""
    size = _size(mask.shape[-2:])
    if size == tuple(mask.shape):
        return mask
    return interpolate(mask[None, None].double(), size, mode="nearest-exact")[0, 0].to(mask.dtype)


def _size(shape: Sequence[int]) -> tuple[int, int]:
    factor = min(1.0, SIDE / max(shape))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """Return an image for people: values of 0 to 1 as they are, others stretched; one or three channels."""
    image = image.detach().float().cpu().nan_to_num()
    image = image[:1] if image.shape[0] < 3 else image[:3]
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        image = (image - low) / max(high - low, 1e-12)
    size = _size(image.shape[-2:])
    if size != tuple(image.shape[-2:]):
        image = interpolate(image[None], size, mode="area")[0]
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
