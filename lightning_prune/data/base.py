"""What the data modules share: augmented samples, loaders that say why they are empty."""

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
    """Anything with a length that gives ``(image (c, h, w) float32, mask (h, w) int64)`` by index."""

    def __len__(self) -> int:
        """How many samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        ...


class Augmented(Dataset[Sample]):
    """The samples, each passed through the transform when it is asked for.

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
    """The samples, each with its :func:`signed_distances` as third entry.

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
        augmented = isinstance(self.samples, Augmented | Distanced)
        samples = self.samples.without_augmentation() if augmented else self.samples
        return Distanced(samples, self.num_classes)


def collate(samples: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One batch ``(n, c, h, w), (n, h, w)``, and whatever else the samples have.

    Raises:
        ValueError: if the samples differ in size.

    Example:
        >>> image, mask = torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64)
        >>> [tuple(t.shape) for t in collate([(image, mask), (image, mask)])]
        [(2, 1, 4, 4), (2, 4, 4)]
    """
    shapes = sorted({tuple(sample[0].shape) for sample in samples})
    if len(shapes) > 1:
        raise ValueError(f"one batch has images of shapes {shapes[:3]}: set size=(h, w), or batch_size=1")
    return tuple(default_collate(list(samples)))


class SegmentationData(L.LightningDataModule):
    """Loaders for three sets of samples; a subclass says where they come from (``load``).

    Only training samples are augmented. The order of the training samples, and the seeds of the workers,
    follow from ``seed`` alone, so that two runs see the same batches whatever else draws random numbers. With
    ``num_workers=0`` the augmentation itself draws from torch's global generator.

    Args:
        batch_size: samples per batch; training drops an incomplete last one unless it is the only one.
        num_workers: loader processes.
        transform: training augmentation, any v2 transform. None: `default_augmentation`; none at all:
            ``v2.Identity()``.
        seed: for the order and the split.
        distance_maps: batches have a third entry, :func:`~lightning_prune.data.signed_distances`
            ``(n, num_classes, h, w)``, for losses that ask for it.

    Raises:
        ValueError: when a loader is asked for: no samples, or distance maps without ``num_classes``.
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
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform: Transform = transform if transform is not None else default_augmentation()
        self.seed = seed
        self.distance_maps = distance_maps
        self._sets: Mapping[str, Samples] = {}

    @abstractmethod
    def load(self) -> Mapping[str, Samples]:
        """The samples under ``"train"``, ``"val"`` and ``"test"``."""

    def samples(self, stage: str) -> Samples:
        """The samples of a stage, without augmentation; loaded once.

        Raises:
            ValueError: if there are none.
        """
        self.setup()
        found = self._sets.get(stage, ())
        if not len(found):
            raise ValueError(self._empty(stage))
        return cast(Samples, found)

    def setup(self, stage: str | None = None) -> None:
        """Load everything, the first time."""
        self._sets = self._sets or self.load()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Augmented, in an order that follows from the seed."""
        samples = self.samples("train")
        rank = self.trainer.global_rank if self.trainer else 0
        generator = torch.Generator().manual_seed(self.seed + rank)
        drop_last = len(samples) > self.batch_size
        augmented = Augmented(samples, self.transform)
        return self._loader(augmented, shuffle=True, drop_last=drop_last, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """As they are, in order."""
        return self._loader(self.samples("val"))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """As they are, in order."""
        return self._loader(self.samples("test"))

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test set."""
        return self.test_dataloader()

    def _loader(
        self,
        samples: Samples,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            self._with_distances(samples),
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            generator=generator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
        )

    def _with_distances(self, samples: Samples) -> Dataset[Any]:
        """The samples with their distance maps, if these are wanted."""
        if self.distance_maps and not hasattr(self, "num_classes"):
            raise ValueError(f"{type(self).__name__} needs an attribute num_classes to make distance maps")
        made = Distanced(samples, self.num_classes) if self.distance_maps else samples
        return cast(Dataset[Any], made)

    def _empty(self, stage: str) -> str:
        counts = {name: len(cast(Sized, found)) for name, found in self._sets.items()}
        return f"{type(self).__name__} has no samples for {stage!r} (it has {counts}): {self._way_out(stage)}"

    def _way_out(self, stage: str) -> str:
        return "give it a larger share"
