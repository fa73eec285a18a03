"""Batches for the repair of a cut and for norms, drawn without any effect on the training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.compensation.calibration import CompensationError
from lightning_prune.utils.example_inputs import (
    Example,
    batched_tensors,
    first_images,
    inputs_of,
    is_image_list,
    num_samples,
    on_device,
)
from lightning_prune.utils.seeding import random_state, seeded, set_random_state

__all__ = ["BatchSource", "first_batches", "generators_of_loaders", "independent_loader", "seeded_batches"]

#: batches that can be read again and again, such as a data loader, or a function that returns an iterator of them
BatchSource = Iterable[Any] | Callable[[], Iterable[Any]]


def first_batches(batches: Iterable[Any], target: nn.Module, number: int) -> list[Any]:
    """Return the first batches of equal image sizes with ``number`` images in all.

    Args:
        batches: any; those without a tensor are left out.
        target: the network; an image is what its forward takes of a batch.
        number: images to return; fewer if the batches have fewer.

    Example:
        >>> [len(batch) for batch in first_batches([torch.zeros(4, 3)] * 3, nn.Linear(3, 1), 6)]
        [4, 2]
    """
    chosen: list[Any] = []
    shapes: list[torch.Size] = []
    for batch in batches:
        example = inputs_of(batch, target.forward)
        size, batch_shapes = num_samples(example), _shapes(example)
        shapes = shapes or batch_shapes
        if not size or shapes != batch_shapes:
            continue
        chosen.append(first_images(batch, size, number))
        number -= size
        if number <= 0:
            break
    return chosen


def _shapes(example: Example | None) -> list[torch.Size]:
    """Return the shape of one image of each tensor; none for lists of images, which may differ in size."""
    if example is None or is_image_list(example):
        return []
    return [tensor.shape[1:] for tensor in batched_tensors(example)]


def independent_loader(loader: Any) -> Any:
    """Return a loader that can be started while ``loader`` runs: persistent workers would begin their epoch anew.

    Raises:
        CompensationError: it can be read only once.
    """
    for source in (loader, getattr(loader, "dataset", None)):
        if isinstance(source, Iterator):
            raise CompensationError(f"{type(source).__name__} can be read only once, and training reads it")
    if not (isinstance(loader, DataLoader) and loader.persistent_workers):
        return loader
    independent = copy.copy(loader)
    vars(independent).update(persistent_workers=False, _iterator=None)
    return independent


def generators_of_loaders(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that the user passed to data loaders and samplers, each once."""
    owners = [owner for loader in loaders for owner in (loader, getattr(loader, "sampler", None))]
    generators = [getattr(owner, "generator", None) for owner in owners]
    # By identity: a loader and its sampler usually share one generator.
    return list({id(it): it for it in generators if isinstance(it, torch.Generator)}.values())


@contextmanager
def seeded_batches(source: BatchSource, seed: int, device: torch.device) -> Iterator[Iterator[Any]]:
    """Give batches of ``source`` on ``device``, which depend on ``seed`` alone, and restore all random states.

    Raises:
        CompensationError: the source can be read only once.

    Example:
        >>> with seeded_batches([torch.ones(2)], 0, torch.device("cpu")) as batches:
        ...     list(batches)
        [tensor([1., 1.])]
    """
    loader = source() if callable(source) else independent_loader(source)
    generators = generators_of_loaders([loader])
    before = random_state(generators)
    try:
        with seeded(seed):
            for generator in generators:
                generator.manual_seed(seed)
            yield (on_device(batch, device) for batch in loader)
    finally:
        set_random_state(before, generators)
