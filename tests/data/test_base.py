"""Data sets that augment samples or add distances, and what they offer without augmentation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_prune.callbacks.held_out_data import split_loader
from lightning_prune.data import signed_distances
from lightning_prune.data.base import Augmented, Distanced

SAMPLES = [(torch.full((1, 2, 2), float(n)), torch.tensor([[0, 1], [0, n % 2]])) for n in range(8)]


def negate(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return -1 - image, mask


def test_without_augmentation_gives_the_samples_before_the_transform():
    augmented = Augmented(SAMPLES, negate)
    assert augmented[3][0].max() == -4
    assert augmented.without_augmentation() is SAMPLES


def test_distances_without_augmentation_are_those_of_the_masks_before_the_transform():
    image, mask, distances = Distanced(Augmented(SAMPLES, negate), 2).without_augmentation()[3]
    assert torch.equal(image, SAMPLES[3][0])
    assert torch.equal(mask, SAMPLES[3][1])
    assert torch.equal(distances, signed_distances(SAMPLES[3][1], 2))
    assert Distanced(SAMPLES, 2).without_augmentation().samples is SAMPLES


def test_held_out_data_of_a_foreign_data_set_that_offers_it_is_not_augmented():
    class Foreign(Dataset[Tensor]):
        def __init__(self, sign: int) -> None:
            self.sign = sign

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor(self.sign * (1 + index))

        def without_augmentation(self) -> Foreign:
            return Foreign(1)

    train, held_out = split_loader(DataLoader(Foreign(-1), batch_size=2), 0.25)
    assert all(batch.max() < 0 for batch in train)
    assert [batch.min() > 0 for batch in held_out] == [True]
