"""What the data modules share: augmented samples, loaders that say why they are empty."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Sized
from typing import Protocol, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

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


def collate(samples: Sequence[Sample]) -> Sample:
    """One batch ``(n, c, h, w), (n, h, w)``.

    Raises:
        ValueError: if the samples differ in size.

    Example:
        >>> image, mask = torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64)
        >>> [tuple(t.shape) for t in collate([(image, mask), (image, mask)])]
        [(2, 1, 4, 4), (2, 4, 4)]
    """
    shapes = sorted({tuple(image.shape) for image, _ in samples})
    if len(shapes) > 1:
        raise ValueError(f"one batch has images of shapes {shapes[:3]}: set size=(h, w), or batch_size=1")
    image, mask = default_collate(list(samples))
    return image, mask


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
    """

    def __init__(
        self, batch_size: int = 8, num_workers: int = 0, transform: Transform | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform: Transform = transform if transform is not None else default_augmentation()
        self.seed = seed
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

    def train_dataloader(self) -> DataLoader[Sample]:
        """Augmented, in an order that follows from the seed."""
        samples = self.samples("train")
        rank = self.trainer.global_rank if self.trainer else 0
        generator = torch.Generator().manual_seed(self.seed + rank)
        drop_last = len(samples) > self.batch_size
        augmented = Augmented(samples, self.transform)
        return self._loader(augmented, shuffle=True, drop_last=drop_last, generator=generator)

    def val_dataloader(self) -> DataLoader[Sample]:
        """As they are, in order."""
        return self._loader(self.samples("val"))

    def test_dataloader(self) -> DataLoader[Sample]:
        """As they are, in order."""
        return self._loader(self.samples("test"))

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The test set."""
        return self.test_dataloader()

    def _loader(
        self,
        samples: Samples,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> DataLoader[Sample]:
        return DataLoader(
            cast(Dataset[Sample], samples),
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            generator=generator,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
        )

    def _empty(self, stage: str) -> str:
        counts = {name: len(cast(Sized, found)) for name, found in self._sets.items()}
        return f"{type(self).__name__} has no samples for {stage!r} (it has {counts}): {self._way_out(stage)}"

    def _way_out(self, stage: str) -> str:
        return "give it a larger share"
