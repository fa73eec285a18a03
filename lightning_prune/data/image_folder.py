"""Data module of images in one folder per class, for classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lightning_prune.data.base import ImageData, Samples
from lightning_prune.data.duplicates import warn_of_duplicates, warn_of_few
from lightning_prune.data.folder import STAGES, split
from lightning_prune.data.image_files import read_image
from lightning_prune.data.readers import extension
from lightning_prune.data.transforms import Transform

__all__ = ["ImageFolder"]

Labelled = tuple[Path, int]


class ClassifiedFiles:
    """Image files with class numbers; each is read, resized and normalised when it is accessed."""

    def __init__(
        self,
        files: Sequence[Labelled],
        size: tuple[int, int],
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.files, self.size, self.channels = files, size, channels
        self.mean, self.std = list(mean), list(std)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a normalised image ``(c, h, w)`` float32 and its class number ``()``."""
        file, label = self.files[index]
        image = F.resize(read_image(file, self.channels), list(self.size), antialias=True)
        return F.normalize(image, self.mean, self.std), torch.tensor(label)


class ImageFolder(ImageData):
    """Images in one folder per class, as ``torchvision.datasets.ImageFolder`` reads them.

    ``root/<class>/*`` is split by ``val``, ``test`` and ``seed``; ``root/train/<class>/*``, ``root/val/...`` and
    ``root/test/...`` are split by their folders. Classes are numbered in the order of their names.

    Args:
        root: the folder.
        num_classes: number of class folders that are expected; None: as many as there are.
        size: ``(h, w)`` that images are resized to.
        channels: 3 for colour, 1 for grey.
        val: share for validation, if no folder has the name of that stage.
        test: share for testing, if no folder has the name of any stage.
        mean: mean of each channel of images in 0 to 1, or one number for all.
        std: standard deviation, as ``mean``.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: training augmentation of the normalised images, any v2 transform. None: a horizontal flip and a
            crop of at least 64 % of the image. To switch augmentation off: ``v2.Identity()``.
        seed: seed of the split and of the order of the training samples.

    Attributes:
        class_names: names of the class folders; known when samples are loaded.

    Raises:
        FileNotFoundError: when samples are loaded: there is no such folder, or it has no class folders.
        ValueError: when samples are loaded: the number of classes is another, stages have other classes, or a file
            cannot be read.

    Warns:
        UserWarning: when samples are loaded: there are three images or fewer, or two stages share an image.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for number, name in enumerate(["cat", "dog"]):
        ...         Path(root, name).mkdir()
        ...         for n in range(4):
        ...             Image.new("L", (16, 8), color=100 * number + 20 * n).save(f"{root}/{name}/{n}.png")
        ...     data = ImageFolder(root, size=(8, 8), channels=1, batch_size=2)
        ...     image, label = next(iter(data.train_dataloader()))
        >>> data.class_names, tuple(image.shape), tuple(label.shape)
        (('cat', 'dog'), (2, 1, 8, 8), (2,))
    """

    def __init__(
        self,
        root: str | Path,
        num_classes: int | None = None,
        size: Sequence[int] = (224, 224),
        channels: int = 3,
        val: float = 0.15,
        test: float = 0.15,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.25,
        batch_size: int = 32,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        height, width = size
        default = v2.Compose(
            [v2.RandomResizedCrop((height, width), (0.64, 1), antialias=True), v2.RandomHorizontalFlip()]
        )
        super().__init__(batch_size, num_workers, default if transform is None else transform, seed)
        self.root, self.size, self.channels = Path(root).expanduser(), (int(height), int(width)), channels
        self.num_classes = num_classes
        self.val_share, self.test_share = val, test
        self.mean, self.std = _per_channel(mean, channels), _per_channel(std, channels)
        self.class_names: tuple[str, ...] = ()

    def load(self) -> Mapping[str, Samples]:
        """Find the files; each is read when its sample is accessed."""
        folders = self._stage_folders()
        self.class_names = self._classes(next(iter(folders.values())))
        found = {stage: self._files(folder) for stage, folder in folders.items()}
        stages = self._with_all_stages(found)
        warn_of_few(sum(map(len, stages.values())), "images")
        names = {
            stage: {_name(folders.get(stage, self.root), f): f for f, _ in files}
            for stage, files in stages.items()
        }
        warn_of_duplicates(names)
        return {
            stage: ClassifiedFiles(files, self.size, self.channels, self.mean, self.std)
            for stage, files in stages.items()
        }

    def _stage_folders(self) -> dict[str, Path]:
        """Return the folder of each stage; the root as that of ``"all"`` if there are none."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}: check root")
        folders = {
            stage: self.root / name
            for stage, names in STAGES.items()
            for name in names
            if (self.root / name).is_dir()
        }
        return folders if "train" in folders else {"all": self.root}

    def _classes(self, folder: Path) -> tuple[str, ...]:
        """Return the names of the class folders."""
        hidden = (".", "_")
        names = sorted(
            path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(hidden)
        )
        if not names:
            raise FileNotFoundError(
                f"{folder} has no folders: put the images of each class into one of its name"
            )
        if self.num_classes not in (None, len(names)):
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"{folder} has {len(names)} class folders ({listed}), but num_classes={self.num_classes}: set "
                f"num_classes={len(names)} (on the command line task.num_classes={len(names)}), or move folders away"
            )
        return tuple(names)

    def _files(self, folder: Path) -> list[Labelled]:
        """Return the images of a stage, sorted, with their class numbers."""
        if (names := self._classes(folder)) != self.class_names:
            differing = sorted(set(names) ^ set(self.class_names))
            raise ValueError(
                f"{folder} and the training images have other classes: {differing[:5]} are in one only"
            )
        files = [
            (file, number)
            for number, name in enumerate(names)
            for file in sorted((folder / name).rglob("*"))
            if extension(file) and not file.name.startswith(".") and file.is_file()
        ]
        empty = sorted(set(range(len(names))) - {number for _, number in files})
        if empty:
            raise ValueError(
                f"{folder / names[empty[0]]} has no images: add some, or remove the folder everywhere"
            )
        return files

    def _with_all_stages(self, found: Mapping[str, list[Labelled]]) -> dict[str, list[Labelled]]:
        """Split what has no folder of its own."""
        if "all" in found:
            return split(found["all"], {"val": self.val_share, "test": self.test_share}, self.seed)
        stages = dict(found)
        if "val" not in stages:
            stages |= split(stages["train"], {"val": self.val_share}, self.seed)
        return stages

    def _advice(self, stage: str) -> str:
        return f"add a folder {self.root / stage} with one folder per class, or give {stage} a share"


def _per_channel(value: float | Sequence[float], channels: int) -> list[float]:
    values = [float(value)] * channels if isinstance(value, (int, float)) else [float(x) for x in value]
    if len(values) != channels:
        raise ValueError(f"{list(values)}: give one number, or one for each of the {channels} channels")
    return values


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
