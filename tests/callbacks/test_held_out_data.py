"""Samples that candidates are judged on: taken out of the training data, and what can be seen of an overlap."""

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

from lightning_prune.callbacks.held_out_data import split_loader, check_disjoint, sample_ids
from lightning_prune.data.base import Augmented, Distanced

DATA = TensorDataset(torch.arange(20.0))


class Changed(Dataset):
    """Passes on another data set's samples, changed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return -self.dataset[index][0]


class Described(Dataset):
    """Keeps a list of dictionaries, as MONAI's data sets do."""

    def __init__(self, *names: str) -> None:
        self.data = [{"image": f"/data/{name}.nii", "label": f"/labels/{name}.nii"} for name in names]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Own(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return reversed(list(super().__iter__()))


def halves(first: Any, second: Any) -> tuple[DataLoader, DataLoader]:
    return DataLoader(Subset(first, range(12))), DataLoader(Subset(second, range(10, 20)))


@pytest.mark.parametrize(
    ("train", "held", "number"),
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
def test_samples_in_both_are_seen_through_views_samplers_and_several_loaders(train, held, number):
    with pytest.raises(
        ValueError, match=rf"holds {number} samples of the training data.* pass held_out=loader"
    ):
        check_disjoint(train, held)


@pytest.mark.parametrize(
    "train",
    [
        DataLoader(Changed(Subset(DATA, range(10)))),
        DataLoader(DATA, sampler=SubsetRandomSampler(range(10))),
        DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 10 + [0.0] * 10, 10)),  # nobody can know
        DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]),
        DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(10)), 2, False)),
    ],
)
def test_what_is_apart_is_let_pass(train):
    check_disjoint(train, DataLoader(Subset(DATA, range(10, 20))))


def test_the_message_names_a_file():
    with pytest.raises(ValueError, match=r"1 samples of the training data \(for example /data/b.nii\)"):
        check_disjoint(DataLoader(Described("a", "b")), DataLoader(Described("b")))


def test_the_rest_is_drawn_as_before():
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(DATA, replacement=True, num_samples=50, generator=generator)
    rest, held = split_loader(DataLoader(DATA, batch_size=5, sampler=sampler), 0.25)
    drawn = torch.cat([batch[0] for batch in rest])
    kept = torch.cat([batch[0] for batch in held])
    assert len(drawn) == 50
    assert rest.sampler.generator is generator
    assert set(drawn.tolist()).isdisjoint(kept.tolist())
    assert isinstance(split_loader(DataLoader(DATA, batch_size=5), 0.25)[0].sampler, SequentialSampler)


def test_held_out_samples_are_not_augmented_though_they_have_distance_maps():
    samples = [(torch.full((1, 2, 2), float(i)), torch.tensor([[0, 1], [0, 1]])) for i in range(8)]
    spoilt = Augmented(samples, lambda image, mask: (image * 0 - 1, mask))
    train, held = split_loader(DataLoader(Distanced(spoilt, num_classes=2), batch_size=2, shuffle=True), 0.25)
    assert all((image == -1).all() for image, _, _ in train)
    ((image, _, distances),) = list(held)
    assert (image >= 0).all()
    assert distances.shape == (2, 2, 2, 2)
    check_disjoint(train, held)
    assert sample_ids(DataLoader(Subset(samples, [0]))) <= sample_ids(DataLoader(Distanced(spoilt, 2)))


@pytest.mark.parametrize(
    "loader",
    [
        Own(DATA, batch_size=2),
        DataLoader(DATA, batch_sampler=[[0, 1]]),
        DataLoader(DATA, sampler=SubsetRandomSampler(range(5))),
        {"a": DataLoader(DATA)},
    ],
)
def test_loaders_that_cannot_be_made_again_are_refused(loader):
    with pytest.raises(ValueError, match="hold them out yourself and pass held_out=loader"):
        split_loader(loader, 0.2)


def test_a_data_set_that_repeats_its_samples_has_none_to_hold_out():
    train, held = split_loader(DataLoader(ConcatDataset([DATA, DATA]), batch_size=4), 0.5)
    with pytest.raises(ValueError, match="samples of the training data"):
        check_disjoint(train, held)
