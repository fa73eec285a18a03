"""The images that repairs are fitted to and judged by, and forwards of a network on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.compensation.im2col import image_axis
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.utils.example_inputs import (
    Example,
    batched_tensors,
    inputs_of,
    is_image_list,
    joined_image_lists,
    num_samples,
    on_device,
)
from lightning_prune.utils.modules import training_modes
from lightning_prune.utils.seeding import seeded

__all__ = [
    "Calibration",
    "CompensationError",
    "CompensationSettings",
    "calibration",
    "output_change",
    "outputs_of",
    "outputs_of_example",
    "undisturbed",
]


class CompensationError(ValueError):
    """The images cannot be used for a repair. Nothing was changed."""


@dataclass(frozen=True)
class CompensationSettings:
    """Sizes of the samples that a repair uses, and its dampings.

    Args:
        positions: sampled output positions per layer for the fit; a quarter of them judge it.
        held_out: share of the images that judge the repair and take no part in the choice of its damping.
        dampings: candidates for the damping of the ridge regression, as shares of the mean variance of the inputs.
        max_elements: upper limit of the size of the matrix that a layer is fitted to. Wide layers get fewer
            positions; those with fewer than ``min_positions`` are left alone.
        min_positions: see ``max_elements``. With fewer positions than inputs, the system of the positions is solved,
            which is as exact and takes the memory of the positions only.
        sums: fit a layer whose output only a sum reads so that the sum, and not the output itself, comes nearer to
            the dense one: a branch then corrects the residual stream too.
        activations: where an activation behind a layer makes the same of a range of values, as a rectifier does of
            those below zero, fit the layer to come into that range, and not to one value of it.
        refit: fit once more to all images, once the held-out ones have accepted the repair.
        refine_passes: passes over the images in which all repaired layers are moved together by gradient steps, so
            that the outputs come nearer to the dense ones: a distillation without labels, for networks that are not
            trained afterwards. The repair takes two to four times as long with 15. ``refit`` is left out then.
        images: number of training images that a cut within training is repaired with; None: 32 for dense prediction,
            256 for classification. Calls that are given batches use all of them.

    Example:
        >>> CompensationSettings(positions=1024).num_positions(width=16)
        1024
    """

    positions: int = 4096
    held_out: float = 0.25
    dampings: Sequence[float] = (1e-6, 1e-3, 1e-2, 1e-1)
    max_elements: int = 2**25
    min_positions: int = 8
    refit: bool = True
    sums: bool = True
    images: int | None = None
    activations: bool = True
    refine_passes: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if min(self.positions, self.max_elements, self.min_positions) < 1:
            raise ValueError("positions, max_elements and min_positions must be positive")
        if self.refine_passes < 0:
            raise ValueError(f"refine_passes must not be negative, got {self.refine_passes}")
        if self.images is not None and self.images < 2:
            raise ValueError(f"repairing a cut needs at least two images, got images={self.images}")

    def num_positions(self, width: int) -> int:
        """Return the number of positions for rows of ``width`` numbers; 0 if the layer is too wide."""
        number = min(self.positions, self.max_elements // width)
        return number if number >= min(self.min_positions, self.positions) else 0


@dataclass(frozen=True)
class Calibration:
    """A batch of images, the last of which are held out.

    Attributes:
        example: as the forward takes it.
        num_images: number of images.
        num_fit: number of images that layers are fitted to; the others judge the fit.
    """

    example: Example
    num_images: int
    num_fit: int


def calibration(model: nn.Module, batches: Sequence[Any], settings: CompensationSettings) -> Calibration:
    """Join batches to one on the device of ``model``.

    Raises:
        CompensationError: there are fewer than two images, values that are not finite, or sizes that do not fit.
    """
    inputs = [each for each in (inputs_of(batch, model.forward) for batch in batches) if each is not None]
    if not inputs:
        raise CompensationError("repairing a cut needs a batch of images")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = on_device(_joined(inputs), device)
    tensors = batched_tensors(example)
    number = num_samples(example)
    if number < 2:
        raise CompensationError(f"repairing a cut needs at least two images, got {number}")
    if not all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()):
        raise CompensationError("the images for repairing a cut have values that are not finite")
    held_out = min(number - 1, max(1, round(number * settings.held_out)))
    return Calibration(example, number, number - held_out)


def _joined(examples: Sequence[Example]) -> Example:
    """Concatenate the tensors of several examples along their first dimension, or their lists of images."""
    if is_image_list(examples[0]):
        try:
            return joined_image_lists(examples)
        except ValueError as error:
            raise CompensationError(f"the batches for repairing a cut differ: {error}") from error
    flat = [tree_flatten(example) for example in examples]
    leaves = [
        torch.cat(values) if isinstance(values[0], Tensor) and values[0].dim() else values[0]
        for values in _transposed([values for values, _ in flat])
    ]
    args, kwargs = tree_unflatten(leaves, flat[0][1])
    return args, kwargs


def _transposed(rows: Sequence[list[Any]]) -> list[tuple[Any, ...]]:
    try:
        columns = list(zip(*rows, strict=True))
        for column in columns:
            shapes = {value.shape[1:] for value in column if isinstance(value, Tensor)}
            if len(shapes) > 1:
                raise CompensationError(f"the batches for repairing a cut have images of sizes {shapes}")
    except ValueError as error:
        raise CompensationError(f"the batches for repairing a cut differ: {error}") from error
    return columns


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in eval mode without gradients, with fixed random numbers; restore modes and buffers."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), training_modes(model, lambda module: False), seeded(0), _without_shortcuts():
            yield
    finally:
        for buffer, value in buffers:
            buffer.data.copy_(value)


@contextmanager
def _without_shortcuts() -> Iterator[None]:
    """Disable the fast path of attention, which calls no modules, and the cache of autocast: weights will change."""
    fast_path, caches_casts = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.set_autocast_cache_enabled(caches_casts)


def outputs_of(model: nn.Module, images: Calibration) -> list[Tensor]:
    """Return all outputs of ``model`` that are floating-point tensors.

    Raises:
        CompensationError: the network cannot run on the images.
    """
    return _outputs(model, images.example)


def outputs_of_example(model: nn.Module, example: Example) -> list[Tensor]:
    """Return the outputs of ``model`` for an example, as :func:`outputs_of` does, and leave ``model`` undisturbed."""
    with undisturbed(model):
        return _outputs(model, example)


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    args, kwargs = example
    try:
        results = model(*args, **kwargs)
    except Exception as error:  # the network's own code may raise anything
        raise CompensationError(
            f"the network cannot run on the images for repairing a cut: {error}"
        ) from error
    return [output for output in tensors_in(results) if output.is_floating_point()]


def output_change(dense: Sequence[Tensor], small: Sequence[Tensor], images: Calibration) -> float:
    """Return the squared distance of outputs from dense ones on held-out images, as a share of their variance.

    It is the mean over all outputs; NaN if none can be compared.
    """
    changes = [
        _change(before, after, images)
        for before, after in zip(dense, small, strict=False)
        if before.shape == after.shape and image_axis(before.shape, images.num_images) is not None
    ]
    return sum(changes) / len(changes) if changes and len(dense) == len(small) else math.nan


def _change(dense: Tensor, small: Tensor, images: Calibration) -> float:
    axis = image_axis(dense.shape, images.num_images)
    assert axis is not None
    first = images.num_fit * axis.entries
    before, after = (x.narrow(axis.dim, first, x.shape[axis.dim] - first).double() for x in (dense, small))
    variance = (before - before.mean()).square().sum().clamp(min=1e-12)
    return float((after - before).square().sum() / variance)
