"""Tests of held-out data: splitting it off the training data, and finding samples in both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_prune.callbacks.held_out_data import check_disjoint, sample_ids, split_loader
from lightning_prune.data.base import Augmented, Distanced

DATA = TensorDataset(torch.arange(20.0))


class Changed(Dataset):
    """Returns changed samples of another data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return -self.dataset[index][0]


class Described(Dataset):
    """Has a list of dictionaries with file names, like MONAI's data sets."""

    def __init__(self, *names: str) -> None:
        self.data = [{"image": f"/data/{name}.nii", "label": f"/labels/{name}.nii"} for name in names]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Reversed(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return reversed(list(super().__iter__()))


def halves(first: Any, second: Any) -> tuple[DataLoader, DataLoader]:
    return DataLoader(Subset(first, range(12))), DataLoader(Subset(second, range(10, 20)))


@pytest.mark.parametrize(
    ("train", "held_out", "number"),
    [
        (*halves(Changed(DATA), DATA), 2),
        (*halves(Subset(DATA, range(20)), Changed(Changed(DATA))), 2),
        (*halves(ConcatDataset([DATA, DATA]), DATA), 2),
        (DataLoader(ConcatDataset([Subset(DATA, range(5)), DATA])), DataLoader(Subset(DATA, [0])), 1),
        (DataLoader(DATA, sampler=SubsetRandomSampler(range(5))), DataLoader(Subset(DATA, range(4, 9))), 1),
        (
            DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([3, 4]), 2, False)),
            DataLoader(DATA),
            2,
        ),
        (DataLoader(DATA, batch_size=None), DataLoader(DATA, batch_size=None), 20),
        ({"a": DataLoader(Subset(DATA, [1])), "b": [DataLoader(DATA)]}, [DataLoader(Subset(DATA, [2]))], 1),
        (DataLoader(Described("a", "b")), DataLoader(Described("b", "c")), 1),
    ],
)
def test_common_samples_are_found_through_views_samplers_and_several_loaders(train, held_out, number):
    with pytest.raises(
        ValueError, match=rf"holds {number} samples of the training data.* pass held_out=loader"
    ):
        check_disjoint(train, held_out)


@pytest.mark.parametrize(
    "train",
    [
        DataLoader(Changed(Subset(DATA, range(10)))),
        DataLoader(DATA, sampler=SubsetRandomSampler(range(10))),
        DataLoader(
            DATA, sampler=WeightedRandomSampler([1.0] * 10 + [0.0] * 10, 10)
        ),  # does not publish its indices
        DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]),
        DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(10)), 2, False)),
    ],
)
def test_disjoint_data_is_accepted(train):
    check_disjoint(train, DataLoader(Subset(DATA, range(10, 20))))


def test_the_message_names_a_file():
    with pytest.raises(ValueError, match=r"1 samples of the training data \(for example /data/b.nii\)"):
        check_disjoint(DataLoader(Described("a", "b")), DataLoader(Described("b")))


def test_the_training_loader_keeps_its_sampler():
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(DATA, replacement=True, num_samples=50, generator=generator)
    train, held_out = split_loader(DataLoader(DATA, batch_size=5, sampler=sampler), 0.25)
    drawn = torch.cat([batch[0] for batch in train])
    held_out_samples = torch.cat([batch[0] for batch in held_out])
    assert len(drawn) == 50
    assert train.sampler.generator is generator
    assert set(drawn.tolist()).isdisjoint(held_out_samples.tolist())
    assert isinstance(split_loader(DataLoader(DATA, batch_size=5), 0.25)[0].sampler, SequentialSampler)


def test_held_out_samples_with_distance_maps_are_not_augmented():
    samples = [(torch.full((1, 2, 2), float(i)), torch.tensor([[0, 1], [0, 1]])) for i in range(8)]
    augmented = Augmented(samples, lambda image, mask: (image * 0 - 1, mask))
    train, held_out = split_loader(
        DataLoader(Distanced(augmented, num_classes=2), batch_size=2, shuffle=True), 0.25
    )
    assert all((image == -1).all() for image, _, _ in train)
    ((image, _, distances),) = list(held_out)
    assert (image >= 0).all()
    assert distances.shape == (2, 2, 2, 2)
    check_disjoint(train, held_out)
    assert sample_ids(DataLoader(Subset(samples, [0]))) <= sample_ids(DataLoader(Distanced(augmented, 2)))


@pytest.mark.parametrize(
    "loader",
    [
        Reversed(DATA, batch_size=2),
        DataLoader(DATA, batch_sampler=[[0, 1]]),
        DataLoader(DATA, sampler=SubsetRandomSampler(range(5))),
        {"a": DataLoader(DATA)},
    ],
)
def test_loaders_that_cannot_be_rebuilt_are_refused(loader):
    with pytest.raises(ValueError, match="hold them out yourself and pass held_out=loader"):
        split_loader(loader, 0.2)


def test_repeated_samples_cannot_be_held_out():
    train, held_out = split_loader(DataLoader(ConcatDataset([DATA, DATA]), batch_size=4), 0.5)
    with pytest.raises(ValueError, match="samples of the training data"):
        check_disjoint(train, held_out)
