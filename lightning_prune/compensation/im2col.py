"""Sampled positions of a layer's output, and the inputs from which the layer computes the output there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.compensation.layers import Layer
from lightning_prune.utils.devices import on_cpu

__all__ = ["ImageAxis", "Positions", "columns", "image_axis", "output_rows", "position_shape", "sample"]

#: One tensor of indices for each dimension of an output but that of channels.
Positions = tuple[Tensor, ...]


@dataclass(frozen=True)
class ImageAxis:
    """The dimension of a tensor that lists the images, and how many of its entries belong to one image."""

    dim: int
    entries: int


def image_axis(shape: torch.Size, num_images: int) -> ImageAxis | None:
    """Return the dimension that lists the images of a batch; None if there is none.

    Example:
        >>> image_axis(torch.Size([7, 4]), num_images=4), image_axis(torch.Size([12, 5]), num_images=4)
        (ImageAxis(dim=1, entries=1), ImageAxis(dim=0, entries=3))
    """
    for dim, size in enumerate(shape):
        if size == num_images:
            return ImageAxis(dim, 1)
    if shape and shape[0] and shape[0] % num_images == 0:
        return ImageAxis(0, shape[0] // num_images)
    return None


def position_shape(layer: Layer, output: Tensor) -> torch.Size | None:
    """Return the shape of a layer's output without its channels; None if it was called without a batch."""
    if layer.is_linear:
        return output.shape[:-1]
    if output.dim() != layer.weight.dim():
        return None
    return torch.Size((output.shape[0], *output.shape[2:]))


@on_cpu()
def sample(
    shape: torch.Size, axis: ImageAxis, images: tuple[int, int], number: int, generator: torch.Generator
) -> Positions:
    """Sample positions of the images from the first to before the last of ``images``, in random order.

    All positions are returned if there are no more than ``number``; else some may be drawn twice.
    """
    bounds = [(0, size) for size in shape]
    bounds[axis.dim] = (images[0] * axis.entries, images[1] * axis.entries)
    sizes = [last - first for first, last in bounds]
    total = math.prod(sizes)
    if total > number:
        drawn = [torch.randint(size, (number,), generator=generator) for size in sizes]
    else:
        drawn = list(torch.unravel_index(torch.randperm(total, generator=generator), sizes))
    return tuple(index + first for index, (first, _) in zip(drawn, bounds, strict=True))


def output_rows(layer: Layer, output: Tensor, positions: Positions, dtype: torch.dtype) -> Tensor:
    """Return the channels of a layer's output at some positions, (positions, channels)."""
    at = [index.to(output.device) for index in positions]
    rows = output[tuple(at)] if layer.is_linear else output[_index(at[0], at[1:])]
    return rows.to(dtype)


def columns(layer: Layer, x: Tensor, positions: Positions, dtype: torch.dtype) -> Tensor:
    """Return what a layer reads for its outputs at some positions, (groups, positions, inputs of a group x taps)."""
    at = tuple(index.to(x.device) for index in positions)
    module = layer.module
    if not isinstance(module, _ConvNd):
        return x[at][None].to(dtype)
    taps = _transposed_taps(module, x, at) if isinstance(module, _ConvTransposeNd) else _taps(module, x, at)
    read = torch.stack(taps, -1).to(dtype)
    return read.view(len(read), module.groups, -1).transpose(0, 1)


def _taps(module: _ConvNd, x: Tensor, at: Positions) -> list[Tensor]:
    """Return the input of each tap of a convolution's kernel, (positions, channels)."""
    if any(padding := _padding(module)):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, padding, mode=mode)
    starts = [place * stride for place, stride in zip(at[1:], module.stride, strict=True)]
    taps = []
    for tap in product(*map(range, module.kernel_size)):
        where = [s + t * d for s, t, d in zip(starts, tap, module.dilation, strict=True)]
        taps.append(x[_index(at[0], where)])
    return taps


def _padding(module: _ConvNd) -> list[int]:
    """Return the padding before and after each dimension, the last one first, that the convolution's forward uses.

    Its attributes may have been changed since it was built, as where strides are replaced by dilation; padding of
    another mode than zeros is stored when it is built.
    """
    if module.padding_mode != "zeros":
        return list(module._reversed_padding_repeated_twice)
    if module.padding == "valid":
        return []
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    assert not isinstance(module.padding, str)
    return [side for side in reversed(module.padding) for _ in range(2)]


def _transposed_taps(module: _ConvNd, x: Tensor, at: Positions) -> list[Tensor]:
    """Return the input of each tap of a transposed convolution: zero where its stride leaves the output out."""
    assert not isinstance(module.padding, str)
    starts = [place + padding for place, padding in zip(at[1:], module.padding, strict=True)]
    taps = []
    for tap in product(*map(range, module.kernel_size)):
        where, valid = [], torch.ones_like(at[0], dtype=torch.bool)
        for s, t, d, stride, size in zip(
            starts, tap, module.dilation, module.stride, x.shape[2:], strict=True
        ):
            place = (s - t * d).div(stride, rounding_mode="floor")
            valid &= ((s - t * d) % stride == 0) & (place >= 0) & (place < size)
            where.append(place.clamp(0, size - 1))
        taps.append(x[_index(at[0], where)] * valid[:, None])
    return taps


def _index(images: Tensor, places: Sequence[Tensor]) -> tuple[Tensor | slice, ...]:
    """Return the index of all channels at some places of some images."""
    return (images, slice(None), *places)
