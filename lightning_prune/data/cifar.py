"""CIFAR-10 from the files of its "python version", as torchvision stores them: ``root/cifar-10-batches-py``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lightning_prune.data.base import Samples
from lightning_prune.data.classification import ClassificationData
from lightning_prune.data.transforms import Transform

__all__ = ["CIFAR10"]

FOLDER = "cifar-10-batches-py"
TRAIN, TEST = tuple(f"data_batch_{n}" for n in range(1, 6)), ("test_batch",)
PIXELS = 3 * 32 * 32


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of dictionaries, lists and numpy arrays; nothing else is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what the pickle of a numpy array needs."""
        allowed = {
            ("_reconstruct", "multiarray"),
            ("ndarray", "numpy"),
            ("dtype", "numpy"),
            ("encode", "_codecs"),
        }
        if (name, module.rpartition(".")[2]) in allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Return images ``(n, 3, 32, 32)`` uint8 and class numbers ``(n,)`` int64 of one file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or has another content.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: give as root the folder that has {FOLDER}, or download the files once with "
            "torchvision.datasets.CIFAR10(root, download=True) or download=true"
        )
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="bytes").load()
        pixels, labels = np.asarray(content[b"data"]), torch.as_tensor(content[b"labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is truncated or no batch of CIFAR-10 ({error!r}): get a fresh copy"
        ) from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise ValueError(
            f"{path} has {pixels.dtype} images of shape {pixels.shape} and {len(labels)} labels; expected uint8 "
            f"({len(labels)}, {PIXELS})"
        )
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), labels.long()


class CIFAR10(ClassificationData):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 3 x 32 x 32, ten classes.

    Images are normalised per channel. Published tables train on all training images and score the test images; with
    ``val=0`` so does this module, and validates on the test images.

    Args:
        root: the ``root`` of torchvision's data set, the folder with ``cifar-10-batches-py``.
        val: share of the training images for validation: the last ones. 0: validate on the test images.
        download: download the files if they are missing, by torchvision.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: training augmentation, any v2 transform. None: a shift by up to 4 pixels and a horizontal flip. To
            switch augmentation off: ``v2.Identity()``.
        seed: seed of the order of the training images.

    Raises:
        FileNotFoundError: when samples are loaded: a file is missing.
        ValueError: ``val`` is not in 0 to 1; when samples are loaded: a file is damaged.

    Example:
        >>> CIFAR10("data").class_names[:3]
        ('airplane', 'automobile', 'bird')
    """

    in_channels = 3
    num_classes = 10
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str | Path,
        val: float = 0.1,
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= val < 1:
            raise ValueError(f"val={val}: give a share of the training images from 0 to below 1")
        super().__init__(32, 4, batch_size, num_workers, transform, seed)
        self.root = Path(root).expanduser()
        self.val_share = val
        self.download = download

    def prepare_data(self) -> None:
        """Download the files, if that was asked for."""
        if self.download:
            datasets.CIFAR10(self.root, download=True)

    def load(self) -> Mapping[str, Samples]:
        """Read the files."""
        images, labels = self._read(TRAIN)
        test = self._samples(*self._read(TEST))
        first = len(labels) - round(self.val_share * len(labels))
        held_out = self._samples(images[first:], labels[first:])
        return {
            "train": self._samples(images[:first], labels[:first]),
            "val": held_out if self.val_share else test,
            "test": test,
        }

    def _read(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(read_batch(self.root / FOLDER / name) for name in names), strict=True)
        return torch.cat(images), torch.cat(labels)
