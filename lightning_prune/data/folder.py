"""Images and masks in folders, as people have them.

Three layouts are understood (the folder names are arguments)::

    root/images/*, root/masks/*                      split by val, test and seed
    root/train/images/*, root/train/masks/*, ...     split by folders
    root/images/train/*, root/masks/train/*, ...     split by folders

An image belongs to the mask with the same path below its folder, without extension and suffixes, so that
``images/berlin/01_photo.jpg`` meets ``masks/berlin/01_label.png`` given the two suffixes.
See `lightning_prune.data.image_files` for what may be in them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightning_prune.data.base import Sample, Samples, SegmentationData
from lightning_prune.data.image_files import Pair, Palette, find_pairs, read_image, read_mask
from lightning_prune.data.masks import check_mask
from lightning_prune.data.transforms import Transform, default_augmentation

STAGES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


Item = TypeVar("Item")


def split(
    items: Sequence[Item], shares: Mapping[str, float], seed: int, what: str = "images"
) -> dict[str, list[Item]]:
    """Cut off the given shares at random; the rest, which comes first in the result, is ``"train"``.

    A share that is not 0 gets at least one item.

    Raises:
        ValueError: if nothing is left for training; ``what`` is what the message calls the items.

    Example:
        >>> {stage: len(part) for stage, part in split(range(10), {"val": 0.2, "test": 0.1}, seed=0).items()}
        {'train': 7, 'val': 2, 'test': 1}
    """
    counts = {stage: max(1, round(share * len(items))) if share else 0 for stage, share in shares.items()}
    rest = len(items) - sum(counts.values())
    if rest < 1:
        raise ValueError(f"{len(items)} {what}, of which {counts}, leave none for training: lower the shares")
    order = np.random.default_rng(seed).permutation(len(items))
    parts = np.split(order, np.cumsum([rest, *counts.values()])[:-1])
    return {
        stage: [items[i] for i in sorted(part)] for stage, part in zip(("train", *counts), parts, strict=True)
    }


def find_stages(root: Path, images: str, masks: str) -> dict[str, tuple[Path, Path]]:
    """The folders of images and masks of each stage; under ``"all"`` if no folder is named after a stage."""
    found: dict[str, tuple[Path, Path]] = {}
    for stage, names in STAGES.items():
        for name in names:
            for folders in (
                (root / name / images, root / name / masks),
                (root / images / name, root / masks / name),
            ):
                if folders[0].is_dir():
                    found.setdefault(stage, folders)
    return found or {"all": (root / images, root / masks)}


class FileSamples:
    """Pairs of files, read when asked for, checked and resized."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        num_classes: int,
        size: tuple[int, int] | None = None,
        channels: int = 3,
        palette: Palette | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self.pairs = pairs
        self.num_classes = num_classes
        self.size = size
        self.channels = channels
        self.palette = palette
        self.ignore_index = ignore_index

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Image ``(c, h, w)`` float32 and mask ``(h, w)`` int64.

        Raises:
            ValueError: if the two differ in size, or for a class number out of range; naming the file.
        """
        pair = self.pairs[index]
        image, mask = read_image(pair.image, self.channels), self.mask(pair)
        if image.shape[1:] != mask.shape:
            sizes = f"{tuple(image.shape[1:])} and {tuple(mask.shape)}"
            raise ValueError(
                f"{pair.image} and {pair.mask} differ in size (h, w): {sizes}; are they partners?"
            )
        check_mask(mask, self.num_classes, self.ignore_index, where=str(pair.mask))
        return (image, mask) if self.size is None else _resize(image, mask, self.size)

    def mask(self, pair: Pair) -> Tensor:
        """Class numbers ``(h, w)`` int64."""
        return read_mask(pair.mask, self.palette)


def _resize(image: Tensor, mask: Tensor, size: tuple[int, int]) -> Sample:
    nearest = InterpolationMode.NEAREST_EXACT
    return F.resize(image, list(size)), F.resize(mask[None], list(size), interpolation=nearest)[0]


class FolderDataModule(SegmentationData):
    """Image and mask files below ``root``; see the module's docstring for the layouts.

    Args:
        root: folder of the data set.
        num_classes: class numbers in the masks are ``0 .. num_classes - 1``.
        images: name of the folders of images.
        masks: name of the folders of masks; the same as ``images`` if the suffixes differ.
        image_suffix: end of the images' names before the extension, such as ``"_photo"``.
        mask_suffix: end of the masks' names before the extension, such as ``"_mask"``.
        palette: class of each colour, ``{(255, 0, 0): 1}`` or ``{"#ff0000": 1}``.
        size: resize to ``(h, w)``, masks by nearest neighbour. None: as they are, which needs equal sizes.
        channels: 3 for colour, 1 for grey.
        ignore_index: a class number for pixels without class.
        val: share for validation, where no folder is named after it.
        test: share for testing, where no folder is named after any stage.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`; the default fills with ``ignore_index``.
        seed: for the split, and the order of the training samples.
        distance_maps: see `SegmentationData`.

    Raises:
        FileNotFoundError: if folders or images are missing.
        ValueError: for images without masks, masks without images, masks that do not fit.
    """

    def __init__(
        self,
        root: str | Path,
        num_classes: int,
        images: str = "images",
        masks: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        palette: Palette | None = None,
        size: Sequence[int] | None = None,
        channels: int = 3,
        ignore_index: int | None = None,
        val: float = 0.15,
        test: float = 0.15,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
        distance_maps: bool = False,
    ) -> None:
        transform = default_augmentation(mask_fill=ignore_index or 0) if transform is None else transform
        super().__init__(batch_size, num_workers, transform, seed, distance_maps)
        self.root = Path(root).expanduser()
        self.num_classes = num_classes
        self.folders = (images, masks)
        self.suffixes = (image_suffix, mask_suffix)
        self.palette = palette
        self.size = _check_size(size)
        self.channels = channels
        self.ignore_index = ignore_index
        self.val_share, self.test_share = val, test

    def pairs(self) -> dict[str, list[Pair]]:
        """The files of each stage."""
        stages = find_stages(self.root, *self.folders)
        found = {stage: find_pairs(*folders, *self.suffixes) for stage, folders in stages.items()}
        if "all" in found:
            return split(found["all"], {"val": self.val_share, "test": self.test_share}, self.seed)
        if "train" in found and "val" not in found:
            found |= split(found["train"], {"val": self.val_share}, self.seed)
        return found

    def load(self) -> Mapping[str, Samples]:
        """Find the files; they are read when asked for."""
        return {stage: self._samples(pairs) for stage, pairs in self.pairs().items()}

    def _samples(self, pairs: Sequence[Pair]) -> FileSamples:
        return FileSamples(pairs, self.num_classes, self.size, self.channels, self.palette, self.ignore_index)

    def _way_out(self, stage: str) -> str:
        folder = self.root / stage / self.folders[0]
        return f"add a folder {folder}, or give {stage} a share of one folder of images"


def _check_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    if size is not None and len(size) != 2:
        raise ValueError(f"size={size}: give (height, width)")
    return None if size is None else (int(size[0]), int(size[1]))
