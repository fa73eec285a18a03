"""Data for classification: batches of images ``(n, c, h, w)`` float32 and class numbers ``(n,)`` int64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.data.base import ImageData
from lightning_prune.data.transforms import Transform, crop_and_flip

__all__ = ["ClassificationData", "ClassifiedImages"]


class ClassifiedImages:
    """Images and class numbers in memory; images are normalised when they are read.

    Args:
        images: ``(n, c, h, w)`` uint8.
        labels: ``(n,)`` integer.
        mean: mean of each channel, in 0 to 1.
        std: standard deviation of each channel.

    Example:
        >>> white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
        >>> image, label = ClassifiedImages(white, torch.tensor([3]), mean=[0.5], std=[0.25])[0]
        >>> image.unique(), label
        (tensor([2.]), tensor(3))
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images = images
        self.labels = labels.long()
        self._scale = 1 / (255 * torch.tensor(std)[:, None, None])
        self._shift = -(torch.tensor(mean) / torch.tensor(std))[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a normalised image ``(c, h, w)`` and its class number ``()``."""
        return self.images[index] * self._scale + self._shift, self.labels[index]


class ClassificationData(ImageData):
    """Base class of data modules for classification; a subclass sets the class attributes.

    Args:
        size: side of the images.
        padding: largest shift of the default augmentation.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: training augmentation of the normalised images, any v2 transform. None: a random shift by up to
            ``padding`` pixels and a horizontal flip. To switch augmentation off: ``v2.Identity()``.
        seed: seed of the order of the training samples.

    Example:
        >>> class Noise(ClassificationData):
        ...     in_channels, num_classes, class_names = 1, 2, ("dark", "bright")
        ...     mean, std = (0.5,), (0.25,)
        ...     def load(self):
        ...         images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        ...         samples = self._samples(images, torch.zeros(4, dtype=torch.int64))
        ...         return dict.fromkeys(("train", "val", "test"), samples)
        >>> data = Noise(8, padding=1, batch_size=2, num_workers=0, transform=None, seed=0)
        >>> image, label = next(iter(data.val_dataloader()))
        >>> tuple(image.shape), image[0, 0, 0, 0].item(), tuple(label.shape)
        ((2, 1, 8, 8), -2.0, (2,))
    """

    in_channels: int
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        size: int,
        padding: int,
        batch_size: int,
        num_workers: int,
        transform: Transform | None,
        seed: int,
    ) -> None:
        black = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        default = crop_and_flip(size, padding, black)
        super().__init__(batch_size, num_workers, default if transform is None else transform, seed)
        self.size = size

    def _samples(self, images: Tensor, labels: Tensor) -> ClassifiedImages:
        return ClassifiedImages(images, labels, self.mean, self.std)
