"""Data that no candidate is trained on: carved out of the training data, or the user's own (level 4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

__all__ = ["HeldOutSource", "split_loader", "check_disjoint", "sample_ids"]

SEED = 0
FILES = ("pairs", "files", "paths", "samples", "imgs", "images", "data")
WRAPPED = ("dataset", "subset", "samples")


def split_loader(loader: Any, share: float, seed: int = SEED) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The same loader without a share of its samples, and one of these, in order and without our augmentation.

    What a data set of one's own does to its samples, it does to these, too. Which ones they are follows from ``seed``
    and their number alone.

    Args:
        loader: of the training data.
        share: of the samples, in (0, 1).
        seed: of the choice.

    Raises:
        ValueError: the share is out of range, leaves nothing, or the loader draws its samples in a way of its own.

    Example:
        >>> train, held_out = carve(DataLoader(torch.arange(10), batch_size=4, shuffle=True), 0.2)
        >>> len(train.dataset), sorted(int(x) for batch in held_out for x in batch)
        (8, [1, 4])
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share in (0, 1), a loader or 'val', got {share}")
    plain = type(loader) is DataLoader and type(loader.sampler) in (RandomSampler, SequentialSampler)
    if not plain or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise ValueError(
            "samples cannot be held out of this training loader, which is no plain DataLoader or draws them by a "
            "sampler of its own: hold them out yourself and pass held_out=loader"
        )
    number = len(loader.dataset)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    held = round(number * share)
    if not 0 < held < number:
        raise ValueError(f"held_out={share} of {number} training samples leaves nothing on one side")
    rest = _like(loader, Subset(loader.dataset, sorted(order[held:])))
    apart = Subset(_without_augmentation(loader.dataset), sorted(order[:held]))
    return rest, DataLoader(apart, loader.batch_size, collate_fn=loader.collate_fn)


def _without_augmentation(dataset: Any) -> Any:
    """Return the same samples without augmentation, if the data set can give them."""
    return dataset.without_augmentation() if hasattr(dataset, "without_augmentation") else dataset


def _sampler(like: Any, dataset: Subset[Any]) -> RandomSampler | None:
    """One that draws from ``dataset`` as ``like`` does; None: in order."""
    if not isinstance(like, RandomSampler):
        return None
    return RandomSampler(dataset, like.replacement, like._num_samples, like.generator)


def _like(loader: DataLoader[Any], dataset: Subset[Any]) -> DataLoader[Any]:
    """A loader with the same arguments, of other samples."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=_sampler(loader.sampler, dataset),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last and len(dataset) > (loader.batch_size or 1),
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


class HeldOutSource(_DataLoaderSource):
    """Where Lightning gets its training loader from, less what is held out.

    Attributes:
        held_out: the loader of that, once the training loader was asked for.
    """

    def __init__(self, source: _DataLoaderSource, share: float) -> None:
        super().__init__(source.instance, source.name)
        self.source, self.share = source, share
        self.held_out: DataLoader[Any] | None = None

    def dataloader(self) -> DataLoader[Any]:
        """What is left for training."""
        rest, self.held_out = split_loader(super().dataloader(), self.share)
        return rest


def check_disjoint(train: Any, held_out: Any) -> None:
    """Raise ValueError where it can be seen that the two share samples. Each is a loader, or several.

    They do if they draw the same indices of the same data set, views of the same tensors, or the same files.

    Example:
        >>> data = TensorDataset(torch.arange(10))
        >>> check_apart(DataLoader(Subset(data, range(8))), DataLoader(Subset(data, range(8, 10))))
        >>> check_apart(DataLoader(Subset(data, range(8))), DataLoader(data))
        Traceback (most recent call last):
        ValueError: the held-out data holds 8 samples of the training data: pass held_out=loader of others
    """
    ours, theirs = (set().union(*map(sample_ids, _loaders(each))) for each in (train, held_out))
    both = ours & theirs
    if both:
        file = next((f" ({name}, say)" for name in sorted(map(str, both)) if "/" in name), "")
        raise ValueError(
            f"the held-out data holds {len(both)} samples of the training data{file}: pass held_out=loader of others"
        )


def sample_ids(loader: DataLoader[Any]) -> set[Any]:
    """A name for every sample that a loader draws: the same sample has the same one, wherever it is drawn.

    Empty where a sampler does not tell what it draws.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return {id(dataset)}
    told = loader.batch_size is not None or loader.batch_sampler is None
    sampler = loader.sampler if told else getattr(loader.batch_sampler, "sampler", None)
    whole = isinstance(sampler, RandomSampler | SequentialSampler)
    indices: Iterable[int] = range(len(dataset)) if whole else getattr(sampler, "indices", ())
    return {_name(dataset, int(index)) for index in indices}


def _loaders(held: Any) -> Iterator[DataLoader[Any]]:
    yield from (
        loader for loader in tree_leaves(getattr(held, "flattened", held)) if isinstance(loader, DataLoader)
    )


def _name(dataset: Any, index: int) -> Any:
    """Of one sample, through views of the data set, to its file if it has one."""
    if isinstance(dataset, Subset):
        return _name(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        part = next(i for i, end in enumerate(dataset.cumulative_sizes) if index < end)
        return _name(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[0][index].data_ptr()
    inner = _inner(dataset)
    if inner is not None:
        return _name(inner, index)
    return _file(dataset, index) or (id(dataset), index)


def _inner(dataset: Any) -> Any:
    """The data set whose samples this one passes on, changed or not, if there is one of the same length."""
    if hasattr(dataset, "without_augmentation") and hasattr(dataset, "samples"):
        return dataset.samples  # a wrapper around anything with a length, which need not be a Dataset
    held = (getattr(dataset, name, None) for name in WRAPPED)
    sized = (each for each in held if isinstance(each, Dataset) and hasattr(each, "__len__"))
    return next((each for each in sized if len(each) == len(dataset)), None)


def _file(dataset: Any, index: int) -> str | None:
    """Where a data set keeps a list with one file per sample, or what begins with it: a tuple, a dictionary."""
    for name in FILES:
        held = getattr(dataset, name, None)
        if isinstance(held, Sequence) and len(held) == len(dataset):
            entry = held[index]
            if isinstance(entry, Mapping):
                entry = tuple(entry.values())
            first = entry[0] if isinstance(entry, tuple) and entry else entry
            if isinstance(first, str | Path):
                return str(Path(first).absolute())
    return None
