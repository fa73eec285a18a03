"""Fashion-MNIST for classification, and scenes composed of its items for segmentation.

`lightning_prune.data.fashion_files` describes where the files are looked for. The test sets of both data modules use
the files of the test split only; the validation sets use the last items of the training files, which no training
image shows, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from torch.nn.functional import pad
from torchvision.transforms import v2

from lightning_prune.data.base import Samples, SegmentationData
from lightning_prune.data.classification import ClassificationData
from lightning_prune.data.fashion_files import ITEM_NAMES, Items, load_items
from lightning_prune.data.scenes import CLASS_NAMES, SceneMaker, SceneSamples
from lightning_prune.data.transforms import Transform

__all__ = ["FashionMNIST", "FashionScenes"]

VALIDATION = 1 / 6  # share of the training items that are in validation scenes only
STAGES = ("train", "val", "test")


def split_items(root: str | Path | None, validation: float) -> dict[str, Items]:
    """Return the items of the three sets: the last ones of the training files are for validation.

    Args:
        root: see :func:`~lightning_prune.data.fashion_files.find_files`.
        validation: share of the training items for validation.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: a file is damaged, or the share is not in 0 to 1.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"val={validation}: give a share of the training items from 0 to below 1")
    items = load_items(root)
    total = len(items["train"].labels)
    first = total - round(validation * total)
    return {
        "train": items["train"].part(0, first),
        "val": items["train"].part(first, total),
        "test": items["test"],
    }


@lru_cache(maxsize=6)
def _scenes(root: str | None, maker: SceneMaker, stage: str, count: int, seed: int) -> SceneSamples:
    """Return the scenes of a stage; drawn once per process."""
    return maker.make(split_items(root, VALIDATION)[stage], count, (seed, STAGES.index(stage)))


class FashionScenes(SegmentationData):
    """Scenes of Fashion-MNIST's items on smooth noise, with six classes.

    A benchmark for segmentation that is large enough to compare methods: any number of independent images, objects
    at any place that hide each other, classes that are easily confused. The ten classes of Fashion-MNIST become five
    (t-shirts, pullovers, coats and shirts are *tops*; sandals, sneakers and boots are *shoes*). Scenes are drawn at
    the first access, about 6,000 a second on one core, and kept in memory (4.6 kB each at 48 x 48).

    Scenes depend on the seed alone, not on ``num_workers``; fewer scenes are the first ones of more.

    Args:
        root: folder of the files of Fashion-MNIST, or the ``root`` that torchvision was given. None: ``./data``, then
            the folder of the Debian package ``dataset-fashion-mnist``.
        size: side of the square scenes in pixels.
        items: number of items in a scene; later ones lie in front.
        noise: standard deviation of the noise that is added to each pixel, whose values are in 0 to 1.
        train: number of training scenes, of the first five sixths of the training items.
        val: number of validation scenes, of the other training items.
        test: number of test scenes, of the test items.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: training augmentation, any v2 transform. None: none, because the items of a scene are already
            mirrored, turned and shifted at random.
        seed: seed of the scenes and of the order of the training scenes.
        distance_maps: see `SegmentationData`.

    Raises:
        ValueError: a number is too small; when samples are loaded: a file is damaged.
        FileNotFoundError: when samples are loaded: there are no files.

    Example:
        >>> data = FashionScenes(train=64, val=8, test=8)
        >>> data.num_classes, data.class_names[1:]
        (6, ('tops', 'trousers', 'dress', 'shoes', 'bag'))
    """

    in_channels = 1
    num_classes = len(CLASS_NAMES)
    class_names = CLASS_NAMES

    def __init__(
        self,
        root: str | Path | None = None,
        size: int = 48,
        items: int = 3,
        noise: float = 0.05,
        train: int = 12000,
        val: int = 1000,
        test: int = 3000,
        batch_size: int = 32,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
        distance_maps: bool = False,
    ) -> None:
        augmentation = v2.Identity() if transform is None else transform
        super().__init__(batch_size, num_workers, augmentation, seed, distance_maps)
        if size < 1 or items < 0 or noise < 0 or min(train, val, test) < 0:
            raise ValueError(
                f"size={size}, items={items}, noise={noise}, train={train}, val={val}, test={test}: negative, or "
                "size 0"
            )
        self.root = None if root is None else str(root)
        self.maker = SceneMaker(size, items, noise)
        self.counts = {"train": train, "val": val, "test": test}

    def load(self) -> Mapping[str, Samples]:
        """Draw the scenes of the three sets."""
        return {
            stage: _scenes(self.root, self.maker, stage, count, self.seed)
            for stage, count in self.counts.items()
        }

    def _advice(self, stage: str) -> str:
        return f"raise {stage}"


class FashionMNIST(ClassificationData):
    """Fashion-MNIST (Xiao et al., 2017): 60,000 training and 10,000 test images of clothes, ten classes.

    Images are normalised to mean 0 and variance 1.

    Args:
        root: see `FashionScenes`.
        size: side of the images: 28, or more to pad them with black, such as 32.
        val: share of the training images for validation: the last ones.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: training augmentation, any v2 transform. None: a shift by up to 2 pixels and a horizontal flip. To
            switch augmentation off: ``v2.Identity()``.
        seed: seed of the order of the training images.

    Raises:
        ValueError: ``size`` is below 28; when samples are loaded: a file is damaged, or ``val`` is not in 0 to 1.
        FileNotFoundError: when samples are loaded: there are no files.

    Example:
        >>> FashionMNIST(size=32).class_names[:3]
        ('t-shirt', 'trouser', 'pullover')
    """

    in_channels = 1
    num_classes = len(ITEM_NAMES)
    class_names = ITEM_NAMES
    mean, std = (0.2860,), (0.3530,)

    def __init__(
        self,
        root: str | Path | None = None,
        size: int = 28,
        val: float = 0.1,
        batch_size: int = 128,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        if size < 28:
            raise ValueError(f"size={size}: the images have 28 x 28 pixels and are only padded")
        super().__init__(size, 2, batch_size, num_workers, transform, seed)
        self.root = root
        self.val_share = val

    def load(self) -> Mapping[str, Samples]:
        """Read the files."""
        sets = split_items(self.root, self.val_share)
        left = (self.size - 28) // 2
        border = (left, self.size - 28 - left) * 2
        return {
            stage: self._samples(pad(items.images[:, None], border), items.labels)
            for stage, items in sets.items()
        }
