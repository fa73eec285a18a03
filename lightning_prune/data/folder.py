"""Data module of image and mask files in folders.

Four layouts are supported (the folder names are arguments)::

    root/images/*, root/masks/*                      split by val, test and seed
    root/train/images/*, root/train/masks/*, ...     split by folders
    root/images/train/*, root/masks/train/*, ...     split by folders
    root/*, with images="." and masks="."            image and mask side by side, told apart by mask_suffix

An image and a mask are paired if their paths below these folders agree, without extension and suffixes:
``images/berlin/01_photo.jpg`` and ``masks/berlin/01_label.png`` with the suffixes ``_photo`` and ``_label``.
`lightning_prune.data.readers` lists the supported kinds of files. A file with several images, such as a volume, is in
one stage with all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from lightning_prune.data.base import Samples, SegmentationData
from lightning_prune.data.duplicates import warn_of_duplicates, warn_of_few
from lightning_prune.data.file_samples import FileSamples, slices_of
from lightning_prune.data.image_files import Pair, Palette, find_pairs
from lightning_prune.data.mask_files import MaskCoding, coding_of
from lightning_prune.data.mask_survey import survey, understand
from lightning_prune.data.transforms import Transform, default_augmentation

STAGES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SAID: set[tuple[str, str]] = set()  # lines on masks, and their data sets, that this process has printed

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


class FolderDataModule(SegmentationData):
    """Image and mask files below ``root``, in one of the layouts in the docstring of the module.

    Args:
        root: folder of the data set.
        num_classes: class numbers in the masks are ``0 .. num_classes - 1``.
        images: name of the folders of images.
        masks: name of the folders of masks; may be the same as ``images`` if the suffixes differ.
        image_suffix: end of the images' names before the extension, such as ``"_photo"``.
        mask_suffix: end of the masks' names before the extension, such as ``"_mask"``.
        palette: what masks mean: class of each colour, ``{(255, 0, 0): 1}`` or ``{"#ff0000": 1}``; the colours of
            the classes in order, ``["black", "red"]``; or class of each stored number, ``{255: 1}``, where others
            stay. None: found out (`lightning_prune.data.mask_survey` says how); `mask_text` then says what.
        size: ``(h, w)`` to resize to, masks by nearest neighbour. None: no resizing; all sizes must be equal.
        channels: 3 for colour, 1 for grey, or the number of channels of the files.
        window: numbers of the images that become 0 and 1, such as ``(-160, 240)`` for CT in Hounsfield units. None:
            those of 8 and 16 bits are scaled by their range, volumes by their 0.5th and 99.5th percentile.
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
        ValueError: when samples are loaded: images have no masks, masks have no images, the two do not fit, a file
            cannot be read, or the masks are not understood.

    Warns:
        UserWarning: when samples are loaded: there are three pairs or fewer, or two stages share an image, by content
            or by name.

    Attributes:
        mask_text: how the masks are read, if that had to be found out; printed once in a process.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name, step in {"images": 60, "masks": 0}.items():
        ...         Path(root, name).mkdir()
        ...         for number in range(4):
        ...             Image.new("L", (16, 8), color=step * number).save(f"{root}/{name}/{number}.png")
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
        window: Sequence[float] | None = None,
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
        self.window = _check_window(window)
        self.mask_text = ""

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
        """Find the files, and find out how to read the masks; each is read when its sample is accessed."""
        stages = self.pairs()
        self.check(stages)
        coding = self.coding([pair.mask for pairs in stages.values() for pair in pairs])
        self.mask_text = coding.text
        if coding.text:
            _say_once(f"masks: {coding.text}", str(self.root.absolute()))
        return {stage: self._samples(self._slices(pairs), coding) for stage, pairs in stages.items()}

    def check(self, stages: Mapping[str, Sequence[Pair]]) -> None:
        """Warn of very few pairs, and of stages that share an image."""
        warn_of_few(sum(map(len, stages.values())))
        folders = [images for images, _ in find_stages(self.root, *self.folders).values()]
        warn_of_duplicates(
            {
                stage: {_name_below(folders, pair.image): pair.image for pair in p}
                for stage, p in stages.items()
            }
        )

    def coding(self, masks: Sequence[Path]) -> MaskCoding:
        """Return how to read the masks.

        Raises:
            ValueError: they are not understood; the message says which palette to give.
        """
        if self.palette is not None:
            return coding_of(self.palette)
        return understand(survey(masks), self.num_classes, self.ignore_index)

    def _slices(self, pairs: Sequence[Pair]) -> list[Pair]:
        return [part for pair in pairs for part in slices_of(pair, self.channels)]

    def _samples(self, pairs: Sequence[Pair], coding: MaskCoding) -> FileSamples:
        channels, ignored = self.channels, self.ignore_index
        return FileSamples(pairs, self.num_classes, self.size, channels, coding, ignored, self.window)

    def _advice(self, stage: str) -> str:
        folder = self.root / stage / self.folders[0]
        return f"add a folder {folder}, or give {stage} a share of one folder of images"


def _check_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    if size is not None and len(size) != 2:
        raise ValueError(f"size={size}: give (height, width)")
    return None if size is None else (int(size[0]), int(size[1]))


def _check_window(window: Sequence[float] | None) -> tuple[float, float] | None:
    if window is not None and (len(window) != 2 or not window[0] < window[1]):
        raise ValueError(f"window={window}: give (low, high), the numbers that become 0 and 1")
    return None if window is None else (float(window[0]), float(window[1]))


def _name_below(folders: Sequence[Path], file: Path) -> str:
    """Return the path of a file below the first of the folders that holds it."""
    folder = next(folder for folder in folders if file.is_relative_to(folder))
    return file.relative_to(folder).as_posix()


@rank_zero_only
def _say_once(line: str, root: str) -> None:
    """Print a line on a data set, unless another run of this process, as of a sweep, has printed it."""
    if (line, root) not in SAID:
        SAID.add((line, root))
        print(line, flush=True)
