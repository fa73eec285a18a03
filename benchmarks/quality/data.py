"""Data of the three tasks as tensors in memory, so that one core trains a network in a minute."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lightning_prune.data import BrainSlices, FashionMNIST, FashionScenes
from lightning_prune.data.base import ImageData, Samples

__all__ = ["Data", "Part", "brain", "fashion", "scenes"]


@dataclass(frozen=True)
class Part:
    """Images ``(n, c, h, w)`` float32 and targets: class numbers ``(n,)`` or masks ``(n, h, w)``, int64."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Part:
        """Return the first ``count`` samples."""
        return Part(self.images[:count], self.targets[:count])

    def to(self, device: str) -> Part:
        """Return the same samples on a device, images with channels last."""
        images = self.images.to(device).contiguous(memory_format=torch.channels_last)
        return Part(images, self.targets.to(device))


@dataclass(frozen=True)
class Data:
    """Training, validation and test samples."""

    train: Part
    val: Part
    test: Part

    def to(self, device: str) -> Data:
        """Return the same samples on a device."""
        return replace(self, **{part.name: getattr(self, part.name).to(device) for part in fields(self)})


@lru_cache(maxsize=1)
def scenes(train: int, val: int, test: int, root: str | None = None) -> Data:
    """Return composed scenes of Fashion-MNIST's items, 48x48, six classes."""
    return _data(FashionScenes(root=root, train=train, val=val, test=test))


@lru_cache(maxsize=1)
def fashion(train: int, val: int, test: int, pool: int, root: str | None = None) -> Data:
    """Return images of Fashion-MNIST, pooled by ``pool``, and their ten classes."""
    data = _data(FashionMNIST(root=root, val=1 / 6), train, val, test)
    parts = (data.train, data.val, data.test)
    return Data(*(Part(avg_pool2d(part.images, pool), part.targets) for part in parts))


@lru_cache(maxsize=1)
def brain(slices: int, size: int) -> Data:
    """Return coronal and axial slices of the brain template with three classes; the split is that of seed 0."""
    axes = ("coronal", "axial")
    return _data(BrainSlices(size=size, axes=axes, slices_per_axis=slices, val=0.15, test=0.2))


def _data(module: ImageData, *counts: int) -> Data:
    """Return the samples of a data module without augmentation, the first ``counts`` of each set."""
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    return Data(*(_part(module.samples(stage), *count) for stage, count in _stages(counts)))


def _stages(counts: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Pair each set with its count, if there are counts."""
    names = ("train", "val", "test")
    return [(name, counts[n : n + 1]) for n, name in enumerate(names)]


def _part(samples: Samples, count: int | None = None) -> Part:
    """Return the first ``count`` samples, or all of them."""
    number = len(samples) if count is None else min(count, len(samples))
    images, targets = zip(*(samples[index] for index in range(number)), strict=True)
    return Part(torch.stack(images), torch.stack(targets).long())
