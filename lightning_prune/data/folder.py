"""Data module of image and mask files in folders.

Three layouts are supported (the folder names are arguments)::

    root/images/*, root/masks/*                      split by val, test and seed
    root/train/images/*, root/train/masks/*, ...     split by folders
    root/images/train/*, root/masks/train/*, ...     split by folders

An image and a mask are paired if their paths below these folders agree, without extension and suffixes:
``images/berlin/01_photo.jpg`` and ``masks/berlin/01_label.png`` with the suffixes ``_photo`` and ``_label``.
`lightning_prune.data.image_files` lists the supported kinds of files.
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
    """Split items at random into the given shares; the rest, first in the result, is ``"train"``.

    Args:
        items: the items; each part keeps their order.
        shares: stage -> share of the items; a share above 0 gets at least one.
        seed: seed of the split.
        what: name of the items in the error message.

    Raises:
        ValueError: nothing is left for training.

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
    """Return the folders of images and masks of each stage; of ``"all"`` if no folder has the name of a stage."""
    stages: dict[str, tuple[Path, Path]] = {}
    for stage, names in STAGES.items():
        for name in names:
            for folders in (
                (root / name / images, root / name / masks),
                (root / images / name, root / masks / name),
            ):
                if folders[0].is_dir():
                    stages.setdefault(stage, folders)
    return stages or {"all": (root / images, root / masks)}


class FileSamples:
    """Samples of image and mask files, which are read, checked and resized at each access."""

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
        """Return image ``(c, h, w)`` float32 and mask ``(h, w)`` int64.

        Raises:
            ValueError: the two differ in size, or a class number is out of range.
        """
        pair = self.pairs[index]
        image, mask = read_image(pair.image, self.channels), self.mask(pair)
        if image.shape[1:] != mask.shape:
            sizes = f"{tuple(image.shape[1:])} and {tuple(mask.shape)}"
            raise ValueError(
                f"{pair.image} and {pair.mask} differ in size (h, w): {sizes}; check that they belong together"
            )
        check_mask(mask, self.num_classes, self.ignore_index, where=str(pair.mask))
        return (image, mask) if self.size is None else _resize(image, mask, self.size)

    def mask(self, pair: Pair) -> Tensor:
        """Return class numbers ``(h, w)`` int64."""
        return read_mask(pair.mask, self.palette)


def _resize(image: Tensor, mask: Tensor, size: tuple[int, int]) -> Sample:
    nearest = InterpolationMode.NEAREST_EXACT
    return F.resize(image, list(size)), F.resize(mask[None], list(size), interpolation=nearest)[0]


class FolderDataModule(SegmentationData):
    """Image and mask files below ``root``, in one of the layouts in the docstring of the module.

    Args:
        root: folder of the data set.
        num_classes: class numbers in the masks are ``0 .. num_classes - 1``.
        images: name of the folders of images.
        masks: name of the folders of masks; may be the same as ``images`` if the suffixes differ.
        image_suffix: end of the images' names before the extension, such as ``"_photo"``.
        mask_suffix: end of the masks' names before the extension, such as ``"_mask"``.
        palette: class of each colour, ``{(255, 0, 0): 1}`` or ``{"#ff0000": 1}``.
        size: ``(h, w)`` to resize to, masks by nearest neighbour. None: no resizing; all sizes must be equal.
        channels: 3 for colour, 1 for grey.
        ignore_index: class number of pixels without class.
        val: share for validation, if no folder has the name of that stage.
        test: share for testing, if no folder has the name of any stage.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`; the default fills with ``ignore_index``.
        seed: seed of the split and of the order of the training samples.
        distance_maps: see `SegmentationData`.

    Raises:
        FileNotFoundError: when samples are loaded: folders or images are missing.
        ValueError: when samples are loaded: images have no masks, masks have no images, or the two do not fit.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("images", "masks"):
        ...         Path(root, name).mkdir()
        ...         for number in range(4):
        ...             Image.new("L", (16, 8)).save(f"{root}/{name}/{number}.png")
        ...     data = FolderDataModule(root, num_classes=2, channels=1, batch_size=2)
        ...     image, mask = next(iter(data.train_dataloader()))
        >>> tuple(image.shape), tuple(mask.shape)
        ((2, 1, 8, 16), (2, 8, 16))
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
        """Return the files of each stage."""
        folders = find_stages(self.root, *self.folders)
        pairs = {stage: find_pairs(*both, *self.suffixes) for stage, both in folders.items()}
        if "all" in pairs:
            return split(pairs["all"], {"val": self.val_share, "test": self.test_share}, self.seed)
        if "train" in pairs and "val" not in pairs:
            pairs |= split(pairs["train"], {"val": self.val_share}, self.seed)
        return pairs

    def load(self) -> Mapping[str, Samples]:
        """Find the files; each is read when its sample is accessed."""
        return {stage: self._samples(pairs) for stage, pairs in self.pairs().items()}

    def _samples(self, pairs: Sequence[Pair]) -> FileSamples:
        return FileSamples(pairs, self.num_classes, self.size, self.channels, self.palette, self.ignore_index)

    def _advice(self, stage: str) -> str:
        folder = self.root / stage / self.folders[0]
        return f"add a folder {folder}, or give {stage} a share of one folder of images"


def _check_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    if size is not None and len(size) != 2:
        raise ValueError(f"size={size}: give (height, width)")
    return None if size is None else (int(size[0]), int(size[1]))
