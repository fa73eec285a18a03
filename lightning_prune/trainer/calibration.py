"""Training images for the repair of a cut, drawn without any effect on the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
from torch import nn

from lightning_prune.pruning.calibration import first_batches, independent_loader
from lightning_prune.trainer.batches import train_batches
from lightning_prune.trainer.lightning_internals import second_training_loader, set_sampler_epoch
from lightning_prune.trainer.resume import generators_of
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
    loader = second_training_loader(trainer, independent_loader)
    if loader is None:
        return []
    device = next(target.parameters()).device
    with _seeded_loaders(trainer, loader.flattened, seed):
        return first_batches(islice(train_batches(trainer, device, loader), number), target, number)


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
