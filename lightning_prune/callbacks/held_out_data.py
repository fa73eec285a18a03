"""Data on which candidates are validated and never trained: split off the training data, or given by the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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

from lightning_prune.trainer.lightning_internals import DataLoaderSource

__all__ = ["HeldOutSource", "check_disjoint", "sample_ids", "split_loader"]

SEED = 0
#: attributes in which data sets usually keep a list with one file per sample
FILE_LISTS = ("pairs", "files", "paths", "samples", "imgs", "images", "data")
#: attributes in which wrappers usually keep the data set whose samples they return
WRAPPED_DATASETS = ("dataset", "subset", "samples")


def split_loader(loader: Any, share: float, seed: int = SEED) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Split a share of the samples off a training loader.

    The choice of samples depends on ``seed`` and on their number alone.

    Args:
        loader: of the training data.
        share: share of the samples to split off, in (0, 1).
        seed: seed of the choice.

    Returns:
        The same loader without these samples, and a loader of these samples, in order. They are not augmented if the
        data set has a method ``without_augmentation``.

    Raises:
        ValueError: the share is out of range, leaves nothing, or the loader cannot be built again: it is iterable, a
            subclass, or has a sampler of its own.

    Example:
        >>> train, held_out = split_loader(DataLoader(torch.arange(10), batch_size=4, shuffle=True), 0.2)
        >>> len(train.dataset), sorted(int(x) for batch in held_out for x in batch)
        (8, [1, 4])
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out must be a share in (0, 1), a loader or 'val', got {share}")
    standard = type(loader) is DataLoader and type(loader.sampler) in (RandomSampler, SequentialSampler)
    if not standard or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise ValueError(
            "samples cannot be held out of this training loader, because it is not a plain DataLoader or has a "
            "sampler of its own: hold them out yourself and pass held_out=loader"
        )
    number = len(loader.dataset)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    count = round(number * share)
    if not 0 < count < number:
        raise ValueError(f"held_out={share} of {number} training samples leaves nothing on one side")
    training = _similar_loader(loader, Subset(loader.dataset, sorted(order[count:])))
    held_out = Subset(_without_augmentation(loader.dataset), sorted(order[:count]))
    return training, DataLoader(held_out, loader.batch_size, collate_fn=loader.collate_fn)


def _without_augmentation(dataset: Any) -> Any:
    """Return the same samples without augmentation, if the data set can give them."""
    return dataset.without_augmentation() if hasattr(dataset, "without_augmentation") else dataset


def _similar_sampler(sampler: Any, dataset: Subset[Any]) -> RandomSampler | None:
    """Return a sampler of ``dataset`` with the settings of ``sampler``; None if it draws in order."""
    if not isinstance(sampler, RandomSampler):
        return None
    return RandomSampler(dataset, sampler.replacement, sampler._num_samples, sampler.generator)


def _similar_loader(loader: DataLoader[Any], dataset: Subset[Any]) -> DataLoader[Any]:
    """Return a loader of ``dataset`` with the arguments of ``loader``."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=_similar_sampler(loader.sampler, dataset),
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


class HeldOutSource(DataLoaderSource):
    """Source of Lightning's training loader that splits samples off it.

    Args:
        source: the trainer's own source.
        share: share of the samples to split off, in (0, 1).

    Attributes:
        held_out: loader of the samples that were split off; None before the training loader is requested.
    """

    def __init__(self, source: DataLoaderSource, share: float) -> None:
        super().__init__(source.instance, source.name)
        self.source, self.share = source, share
        self.held_out: DataLoader[Any] | None = None

    def dataloader(self) -> DataLoader[Any]:
        """Return the training loader without the samples that are held out."""
        training, self.held_out = split_loader(super().dataloader(), self.share)
        return training


def check_disjoint(train: Any, held_out: Any) -> None:
    """Raise ValueError if training data and held-out data share samples; each is a loader or a collection of them.

    Samples are the same if they have the same index in the same data set, are views of the same tensor, or come from
    the same file.

    Example:
        >>> data = TensorDataset(torch.arange(10))
        >>> check_disjoint(DataLoader(Subset(data, range(8))), DataLoader(Subset(data, range(8, 10))))
        >>> check_disjoint(DataLoader(Subset(data, range(8))), DataLoader(data))
        Traceback (most recent call last):
        ValueError: the held-out data holds 8 samples of the training data: pass held_out=loader of others
    """
    ids = [set().union(*map(sample_ids, _loaders(loaders))) for loaders in (train, held_out)]
    common = ids[0] & ids[1]
    if common:
        files = sorted(str(name) for name in common if "/" in str(name))
        example = f" (for example {files[0]})" if files else ""
        raise ValueError(
            f"the held-out data holds {len(common)} samples of the training data{example}: pass held_out=loader of "
            "others"
        )


def sample_ids(loader: DataLoader[Any]) -> set[Any]:
    """Return an identifier of every sample that a loader draws; equal samples have equal identifiers in all loaders.

    Empty if the sampler does not publish the indices that it draws.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return {id(dataset)}
    samples_by_index = loader.batch_size is not None or loader.batch_sampler is None
    sampler = loader.sampler if samples_by_index else getattr(loader.batch_sampler, "sampler", None)
    whole = isinstance(sampler, RandomSampler | SequentialSampler)
    indices: Iterable[int] = range(len(dataset)) if whole else getattr(sampler, "indices", ())
    return {_sample_id(dataset, int(index)) for index in indices}


def _loaders(loaders: Any) -> Iterator[DataLoader[Any]]:
    """Yield the data loaders in a loader, a collection of loaders, or a ``CombinedLoader``."""
    leaves = tree_leaves(getattr(loaders, "flattened", loaders))
    yield from (leaf for leaf in leaves if isinstance(leaf, DataLoader))


def _sample_id(dataset: Any, index: int) -> Any:
    """Identify one sample: by the address of its tensor, by its file, or by its index in the innermost data set."""
    if isinstance(dataset, Subset):
        return _sample_id(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        part = next(i for i, end in enumerate(dataset.cumulative_sizes) if index < end)
        start = dataset.cumulative_sizes[part - 1] if part else 0
        return _sample_id(dataset.datasets[part], index - start)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[0][index].data_ptr()  # views of one tensor share addresses
    wrapped = _wrapped_dataset(dataset)
    if wrapped is not None:
        return _sample_id(wrapped, index)
    return _file(dataset, index) or (id(dataset), index)


def _wrapped_dataset(dataset: Any) -> Any:
    """Return the data set of the same length whose samples this one returns, changed or not; None without one."""
    if hasattr(dataset, "without_augmentation") and hasattr(dataset, "samples"):
        return dataset.samples  # a wrapper around anything with a length, which need not be a Dataset
    attributes = (getattr(dataset, name, None) for name in WRAPPED_DATASETS)
    sized = (it for it in attributes if isinstance(it, Dataset) and hasattr(it, "__len__"))
    return next((it for it in sized if len(it) == len(dataset)), None)


def _file(dataset: Any, index: int) -> str | None:
    """Return the file of a sample, from a list with one entry per sample; None if there is no such list.

    An entry is a path, or a tuple or dictionary whose first value is a path.
    """
    for name in FILE_LISTS:
        entries = getattr(dataset, name, None)
        if isinstance(entries, Sequence) and len(entries) == len(dataset):
            entry = entries[index]
            if isinstance(entry, Mapping):
                entry = tuple(entry.values())
            first = entry[0] if isinstance(entry, tuple) and entry else entry
            if isinstance(first, str | Path):
                return str(Path(first).absolute())
    return None
