"""Samples of image and mask files, and which images of files with several belong together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightning_prune.data.base import Sample
from lightning_prune.data.image_files import Pair, read_image
from lightning_prune.data.mask_files import MaskCoding
from lightning_prune.data.masks import check_mask
from lightning_prune.data.readers import num_slices

__all__ = ["FileSamples", "slices_of"]


class FileSamples:
    """Samples of image and mask files, which are read, checked and resized at each access."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        num_classes: int,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        coding: MaskCoding | None = None,
        ignore_index: int | None = None,
        window: Sequence[float] | None = None,
    ) -> None:
        self.pairs = pairs
        self.num_classes = num_classes
        self.size = size
        self.channels = channels
        self.coding = coding or MaskCoding()
        self.ignore_index = ignore_index
        self.window = window

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Return image ``(c, h, w)`` float32 and mask ``(h, w)`` int64.

        Raises:
            ValueError: the two differ in size, a class number is out of range, or a file cannot be read.
        """
        pair = self.pairs[index]
        image, mask = read_image(pair.image, self.channels, pair.page, self.window), self.mask(pair)
        if image.shape[1:] != mask.shape:
            sizes = f"{tuple(image.shape[1:])} and {tuple(mask.shape)}"
            raise ValueError(
                f"{pair.image} and {pair.mask} differ in size (h, w): {sizes}; check that they belong together"
            )
        check_mask(mask, self.num_classes, self.ignore_index, where=str(pair.mask))
        return (image, mask) if self.size is None else _resize(image, mask, self.size)

    def mask(self, pair: Pair) -> Tensor:
        """Return class numbers ``(h, w)`` int64."""
        return self.coding.read(pair.mask, pair.page or 0)


def slices_of(pair: Pair, channels: int) -> list[Pair]:
    """Return a pair for each image of two files.

    Raises:
        ValueError: the two have different numbers of images, or one of them cannot be read.
    """
    images, masks = num_slices(pair.image), num_slices(pair.mask)
    if images == masks:
        return [pair._replace(page=page) for page in range(images)]
    if masks == 1 and images == channels:
        return [pair._replace(page=None)]
    raise ValueError(
        f"{pair.image} has {images} images, but {pair.mask} has {masks}: give one mask for each, or, if they are "
        f"the channels of one image, channels={images}"
    )


def _resize(image: Tensor, mask: Tensor, size: tuple[int, int]) -> Sample:
    nearest = InterpolationMode.NEAREST_EXACT
    return F.resize(image, list(size)), F.resize(mask[None], list(size), interpolation=nearest)[0]
