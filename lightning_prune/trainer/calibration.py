"""Training images for the repair of a cut, drawn without any effect on the training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.compensation.calibration import CompensationError
from lightning_prune.trainer.batches import train_batches
from lightning_prune.trainer.lightning_internals import second_training_loader, set_sampler_epoch
from lightning_prune.trainer.resume import generators_of
from lightning_prune.utils.example_inputs import (
    Example,
    batched_tensors,
    first_images,
    inputs_of,
    is_image_list,
    num_samples,
)
from lightning_prune.utils.seeding import random_state, seeded, set_random_state

__all__ = ["calibration_batches"]


def calibration_batches(trainer: L.Trainer, target: nn.Module, number: int, seed: int) -> list[Any]:
    """Return training batches with ``number`` images in all, on the device of ``target``.

    The images depend on ``seed`` alone, and are drawn without an effect on random states and on the epoch's order.
    Batches with images of another size than those of the first batch are left out, so that all can be joined.

    Args:
        trainer: its training data are read.
        target: the network; an image is what its forward takes of a batch.
        number: images to return; fewer if one pass over the data, or ``number`` batches, have fewer.
        seed: not negative.

    Raises:
        CompensationError: the training data can be read only once.
    """
    loader = second_training_loader(trainer, _independent)
    if loader is None:
        return []
    device = next(target.parameters()).device
    with _seeded_loaders(trainer, loader.flattened, seed):
        return _first_batches(islice(train_batches(trainer, device, loader), number), target, number)


def _first_batches(batches: Iterable[Any], target: nn.Module, number: int) -> list[Any]:
    """Return the first batches of equal image sizes with ``number`` images in all."""
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


@contextmanager
def _seeded_loaders(trainer: L.Trainer, loaders: Sequence[Any], seed: int) -> Iterator[None]:
    """Seed all random generators and samplers of the training data, and restore them at the end."""
    generators = generators_of(trainer)
    before = random_state(generators)
    try:
        with seeded(seed):
            for generator in generators:
                generator.manual_seed(seed)
            for loader in loaders:
                set_sampler_epoch(loader, seed)
            yield
    finally:
        set_random_state(before, generators)
        for loader in loaders:
            set_sampler_epoch(loader, trainer.current_epoch)


def _independent(loader: Any) -> Any:
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
