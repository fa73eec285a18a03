"""Base classes of the data modules, and the data sets that augment samples or add distance maps."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Protocol, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_prune.data.distance_maps import signed_distances
from lightning_prune.data.transforms import Transform, augment, default_augmentation

Sample = tuple[Tensor, Tensor]


class Samples(Protocol):
    """Sized collection of samples ``(image (c, h, w) float32, target int64)``, read by index.

    The target is a mask ``(h, w)`` or, for classification, a class number ``()``.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        ...


class Augmented(Dataset[Sample]):
    """Samples that pass through a random transform each time they are read.

    Args:
        samples: images and targets.
        transform: see :func:`~lightning_prune.data.augment`.

    Example:
        >>> from torchvision.transforms import v2
        >>> samples = [(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0, 1]]))]
        >>> Augmented(samples, v2.RandomHorizontalFlip(p=1.0))[0][1]
        tensor([[1, 0]])
    """

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return augment(self.transform, *self.samples[index])

    def without_augmentation(self) -> Samples:
        """Return the samples before the transform."""
        return self.samples


class Distanced(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples with their :func:`signed_distances` as third entry, computed when a sample is read.

    Args:
        samples: images and masks.
        num_classes: number of distance maps per sample.

    Example:
        >>> samples = [(torch.zeros(1, 2, 2), torch.tensor([[0, 1], [0, 1]]))]
        >>> [tuple(entry.shape) for entry in Distanced(samples, num_classes=2)[0]]
        [(1, 2, 2), (2, 2), (2, 2, 2)]
    """

    def __init__(self, samples: Samples, num_classes: int) -> None:
        self.samples = samples
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, mask = self.samples[index]
        return image, mask, signed_distances(mask, self.num_classes)

    def without_augmentation(self) -> "Distanced":
        """Return the same data set over samples without augmentation; the distances follow their masks."""
        samples = self.samples.without_augmentation() if isinstance(self.samples, Augmented) else self.samples
        return Distanced(samples, self.num_classes)


def collate(samples: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Stack samples to one batch: images ``(n, c, h, w)``, targets ``(n, h, w)`` or ``(n,)``, and further entries.

    Raises:
        ValueError: the images differ in shape.

    Example:
        >>> image, mask = torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64)
        >>> [tuple(t.shape) for t in collate([(image, mask), (image, mask)])]
        [(2, 1, 4, 4), (2, 4, 4)]
    """
    shapes = sorted({tuple(sample[0].shape) for sample in samples})
    if len(shapes) > 1:
        raise ValueError(f"one batch has images of shapes {shapes[:3]}: set size=(h, w), or batch_size=1")
    return tuple(default_collate(list(samples)))


class ImageData(L.LightningDataModule):
    """Base class of data modules with three sets of samples; a subclass provides them in :meth:`load`.

    Only training samples are augmented. The order of the training samples and the seeds of the workers depend on
    ``seed`` alone, so that two runs train on the same batches whatever else draws random numbers. With
    ``num_workers=0``, however, the augmentation draws from torch's global generator.

    Args:
        batch_size: samples per batch; training drops an incomplete last one unless it is the only one.
        num_workers: loader processes.
        transform: training augmentation, any v2 transform; ``v2.Identity()`` for none.
        seed: seed of the order and of the split.

    Raises:
        ValueError: when a loader is made: there are no samples.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        transform: Transform,
        seed: int,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform = transform
        self.seed = seed
        self._sets: Mapping[str, Samples] = {}

    @abstractmethod
    def load(self) -> Mapping[str, Samples]:
        """Return the samples of ``"train"``, ``"val"`` and ``"test"``."""

    def samples(self, stage: str) -> Samples:
        """Return the samples of a stage without augmentation; loaded once.

        Raises:
            ValueError: there are none.
        """
        self.setup()
        samples = self._sets.get(stage, ())
        if not len(samples):
            raise ValueError(self._no_samples(stage))
        return cast(Samples, samples)

    def has_samples(self, stage: str) -> bool:
        """Return whether there are samples of a stage: ``"train"``, ``"val"`` or ``"test"``."""
        self.setup()
        return bool(len(cast(Sized, self._sets.get(stage, ()))))

    def setup(self, stage: str | None = None) -> None:
        """Load the samples of all stages at the first call."""
        self._sets = self._sets or self.load()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of augmented training samples, shuffled by the seed."""
        samples = self.samples("train")
        rank = self.trainer.global_rank if self.trainer else 0
        generator = torch.Generator().manual_seed(self.seed + rank)
        drop_last = len(samples) > self.batch_size
        augmented = Augmented(samples, self.transform)
        return self._loader(augmented, shuffle=True, drop_last=drop_last, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of the validation samples, in order and without augmentation."""
        return self._loader(self.samples("val"))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of the test samples, in order and without augmentation."""
        return self._loader(self.samples("test"))

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the loader of the test samples."""
        return self.test_dataloader()

    def _loader(
        self,
        samples: Samples,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            self._prepared(samples),
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            generator=generator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
        )

    def _prepared(self, samples: Samples) -> Dataset[Any]:
        """Return the data set that a loader reads."""
        return cast(Dataset[Any], samples)

    def _no_samples(self, stage: str) -> str:
        """Return the error message for a stage without samples."""
        counts = {name: len(cast(Sized, samples)) for name, samples in self._sets.items()}
        return f"{type(self).__name__} has no samples for {stage!r} (it has {counts}): {self._advice(stage)}"

    def _advice(self, stage: str) -> str:
        """Return how to get samples for a stage that has none."""
        return "give it a larger share"


class SegmentationData(ImageData):
    """Base class of data modules for segmentation: :class:`ImageData` with masks and their distance maps.

    Args:
        batch_size: samples per batch; training drops an incomplete last one unless it is the only one.
        num_workers: loader processes.
        transform: training augmentation, any v2 transform. None: `default_augmentation`. To switch augmentation
            off: ``v2.Identity()``.
        seed: seed of the order and of the split.
        distance_maps: add :func:`~lightning_prune.data.signed_distances` ``(n, num_classes, h, w)`` as third entry
            of each batch, for losses that need them.

    Raises:
        ValueError: when a loader is made: there are no samples, or ``distance_maps`` without ``num_classes``.

    Example:
        >>> class Squares(SegmentationData):
        ...     num_classes = 2
        ...     def load(self):
        ...         mask = torch.zeros(8, 8, dtype=torch.int64)
        ...         return dict.fromkeys(("train", "val", "test"), [(mask[None].float(), mask)] * 4)
        >>> image, mask = next(iter(Squares(batch_size=2).val_dataloader()))
        >>> tuple(image.shape), tuple(mask.shape)
        ((2, 1, 8, 8), (2, 8, 8))
    """

    num_classes: int

    def __init__(
        self,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
        distance_maps: bool = False,
    ) -> None:
        super().__init__(
            batch_size, num_workers, default_augmentation() if transform is None else transform, seed
        )
        self.distance_maps = distance_maps

    def _prepared(self, samples: Samples) -> Dataset[Any]:
        """Add distance maps to the samples, if the option is set."""
        if self.distance_maps and not hasattr(self, "num_classes"):
            raise ValueError(f"{type(self).__name__} needs an attribute num_classes to make distance maps")
        return Distanced(samples, self.num_classes) if self.distance_maps else super()._prepared(samples)
