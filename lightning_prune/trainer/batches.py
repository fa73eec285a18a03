"""Batches outside of Lightning's loops, prepared as the loops prepare them for a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from lightning_prune.trainer.lightning_internals import before_batch_transfer, second_training_loader
from lightning_prune.utils.batch_norm import average_norms_, recalibrate_
from lightning_prune.utils.distributed import broadcast, gather_all
from lightning_prune.utils.example_inputs import Example, inputs_of, one_sample
from lightning_prune.utils.modules import training_modes

__all__ = ["IndexedBatch", "held_out_batches", "train_batches", "transfer_batch"]

#: a batch, its index, and the index of its loader; None if there is one loader
IndexedBatch = tuple[Any, int, int | None]


def first_sample(batch: Any, target: nn.Module) -> Example:
    """Return one sample of a training batch as example input, on the CPU; all processes get that of rank 0.

    Raises:
        ValueError: the batch holds no tensor.
    """
    example = inputs_of(batch, target.forward)
    if example is None:
        raise ValueError(
            f"no example input: a training batch of type {type(batch).__name__} holds no tensor; set "
            "example_input_array of the LightningModule"
        )
    return broadcast(move_data_to_device(one_sample(example), torch.device("cpu")))


def train_inputs(trainer: L.Trainer, target: nn.Module) -> Iterator[Example]:
    """Yield the inputs of ``target`` for one pass over the training data, on its device.

    Batches without a tensor are left out.
    """
    for batch in train_batches(trainer, next(target.parameters()).device):
        if (example := inputs_of(batch, target.forward)) is not None:
            yield example


def forward_training_data(trainer: L.Trainer, target: nn.Module) -> None:
    """Run ``target`` over the training data once, in eval mode, without gradients, so that hooks see activations."""
    with torch.no_grad(), training_modes(target, lambda module: False), forward_context(trainer):
        for args, kwargs in train_inputs(trainer, target):
            target(*args, **kwargs)


@contextmanager
def forward_context(trainer: L.Trainer) -> Iterator[None]:
    """Use the precision of training, and run compiled code eagerly, because it skips forward hooks."""
    with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield


def recalibrate_norms_(trainer: L.Trainer, networks: Sequence[nn.Module], number: int) -> None:
    """Estimate the running statistics of batch norms anew, on ``number`` training batches of every process.

    The estimates of all processes are averaged; see :func:`~lightning_prune.utils.batch_norm.recalibrate_`.
    """
    # Synchronised norms wait for each other in every forward: all processes must use the same number of batches.
    number = min(gather_all(int(min(number, trainer.num_training_batches))))
    for network in networks:
        with forward_context(trainer):
            used = recalibrate_(network, islice(train_inputs(trainer, network), number))
        average_norms_(network, used)


def transfer_batch(trainer: L.Trainer, batch: Any, device: torch.device, loader_index: int = 0) -> Any:
    """Return a batch on ``device``, after precision plugin, module and data module have converted it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(trainer.lightning_module, batch, loader_index)
    return trainer.strategy.batch_to_device(batch, device, dataloader_idx=loader_index)


def train_batches(
    trainer: L.Trainer, device: torch.device, loader: CombinedLoader | None = None
) -> Iterator[Any]:
    """Yield the batches of one training epoch on ``device``, from one loader or several combined ones.

    Args:
        trainer: runs the training, and prepares the batches as for a step.
        device: to put the batches on.
        loader: to draw from; None: a new one over the training data.
    """
    loader = second_training_loader(trainer) if loader is None else loader
    if loader is None:
        return
    for batch, index, _ in loader:
        if index >= trainer.num_training_batches:
            break
        yield transfer_batch(trainer, batch, device)


def held_out_batches(
    trainer: L.Trainer, loaders: Any, device: torch.device, number: int | None = None
) -> list[IndexedBatch]:
    """Return the batches of one loader, or of several one after the other, prepared as for validation.

    Args:
        trainer: runs the training; its limit of validation batches holds for its own validation loaders.
        loaders: a loader or a collection of loaders.
        device: to put the batches on.
        number: how many batches of each loader at most; None: all.
    """
    combined = CombinedLoader(loaders, "sequential")
    several = len(combined.flattened) > 1
    is_validation = loaders is trainer.val_dataloaders
    limits = trainer.num_val_batches if is_validation else [math.inf] * len(combined.flattened)
    combined.limits = [min(limit, math.inf if number is None else number) for limit in limits]
    with _validation_stage(trainer):
        return [
            (transfer_batch(trainer, batch, device, loader), index, loader if several else None)
            for batch, index, loader in combined
        ]


@contextmanager
def _validation_stage(trainer: L.Trainer) -> Iterator[None]:
    """Set the trainer's stage to validation, so that hooks for batches do not augment."""
    stage, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
    try:
        with training_modes(trainer.lightning_module, lambda module: False):
            yield
    finally:
        trainer.state.stage = stage
