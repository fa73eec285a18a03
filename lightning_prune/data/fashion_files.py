"""Find and read the files of Fashion-MNIST (Xiao et al., 2017): 70,000 grey images of 28 x 28, ten classes.

Nothing is downloaded. The files come from torchvision (``root/FashionMNIST/raw``) or from the Debian package
``dataset-fashion-mnist``, compressed or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.data.idx import read_idx

__all__ = ["ITEM_NAMES", "Items", "find_files", "load_items"]

ITEM_NAMES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREFIXES = {"train": "train", "test": "t10k"}
ADVICE = (
    "install the Debian package (apt-get install dataset-fashion-mnist), or download the files once "
    "(torchvision.datasets.FashionMNIST(root, download=True)) and give root"
)


class Items(NamedTuple):
    """Images ``(n, 28, 28)`` and class numbers ``(n,)``, both uint8."""

    images: Tensor
    labels: Tensor

    def part(self, start: int, stop: int) -> Items:
        """Return the items from ``start`` to before ``stop``."""
        return Items(self.images[start:stop], self.labels[start:stop])


def find_files(root: str | Path | None = None) -> dict[str, tuple[Path, Path]]:
    """Return the files of images and labels of ``"train"`` and ``"test"``.

    Args:
        root: folder with the files, or the ``root`` that torchvision was given. None: ``./data``, then the
            folder of the Debian package.

    Raises:
        FileNotFoundError: no folder has all four files.
    """
    folders = [*_folders(root)]
    for folder in folders:
        pairs = {stage: _pair(folder, prefix) for stage, prefix in PREFIXES.items()}
        if all(path is not None for pair in pairs.values() for path in pair):
            return pairs  # type: ignore[return-value]
    places = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"the four files of Fashion-MNIST are in none of {places}: {ADVICE}")


def _folders(root: str | Path | None) -> Iterator[Path]:
    """Yield the folders to search, in order."""
    for folder in [Path("data")] if root is None else [Path(root).expanduser()]:
        yield from (folder, folder / "FashionMNIST" / "raw")
    if root is None:
        yield DEBIAN


def _pair(folder: Path, prefix: str) -> tuple[Path | None, Path | None]:
    """Return the files of images and of labels, compressed or not; None: there is no such file."""
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    first, second = (
        next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        for name in names
    )
    return first, second


def load_items(root: str | Path | None = None) -> dict[str, Items]:
    """Return the items of ``"train"`` and ``"test"``; files are read once per process.

    Args:
        root: see :func:`find_files`.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a file is damaged, or images and labels do not fit.
    """
    return {stage: _read(*pair) for stage, pair in find_files(root).items()}


@lru_cache(maxsize=4)
def _read(images: Path, labels: Path) -> Items:
    """Read and check a file of images and one of labels."""
    items = Items(torch.from_numpy(read_idx(images)), torch.from_numpy(read_idx(labels)))
    if items.images.shape[1:] != (28, 28) or items.labels.shape != items.images.shape[:1]:
        shapes = f"{tuple(items.images.shape)} and {tuple(items.labels.shape)}"
        raise ValueError(f"{images} and {labels} have shapes {shapes}; expected (n, 28, 28) and (n,)")
    if len(items.labels) and int(items.labels.max()) >= len(ITEM_NAMES):
        raise ValueError(f"{labels} has class number {int(items.labels.max())}; expected 0 to 9")
    return items
