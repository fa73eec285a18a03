"""Batches as Lightning's loops would hand them to a step, outside of these loops (level 4)."""

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

from lightning_prune.utils.batch_norm import recalibrate_, tracked_norms
from lightning_prune.utils.distributed import average_, gathered, shared
from lightning_prune.utils.example_inputs import Example, inputs_of, one_sample
from lightning_prune.utils.modules import switched

__all__ = ["Indexed", "held_batches", "moved", "train_batches"]


def first_sample(batch: Any, target: nn.Module) -> Example:
    """One sample of a training batch, as the example input; in all processes that of the first one.

    Raises:
        ValueError: the batch holds no tensor.
    """
    example = inputs_of(batch, target.forward)
    if example is None:
        raise ValueError(
            f"no example input: a training batch of type {type(batch).__name__} holds no tensor to take; set "
            "example_input_array of the LightningModule"
        )
    return shared(move_data_to_device(one_sample(example), torch.device("cpu")))


def train_inputs(trainer: L.Trainer, target: nn.Module) -> Iterator[Example]:
    """The inputs of one pass over the training data, on the device, as training sees them."""
    for batch in train_batches(trainer, next(target.parameters()).device):
        if (example := inputs_of(batch, target.forward)) is not None:
            yield example


def observe(trainer: L.Trainer, target: nn.Module) -> None:
    """A pass over the training data in eval mode, for whoever watches ``target``."""
    with torch.no_grad(), switched(target, lambda module: False), forward_context(trainer):
        for args, kwargs in train_inputs(trainer, target):
            target(*args, **kwargs)


@contextmanager
def forward_context(trainer: L.Trainer) -> Iterator[None]:
    """The precision that training runs in, without compiled code, which hooks cannot see into."""
    with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield


def renew_norms_(trainer: L.Trainer, networks: Sequence[nn.Module], number: int) -> None:
    """:func:`~lightning_prune.utils.batch_norm.recalibrate_` on ``number`` batches of every process, as one estimate."""
    number = min(
        gathered(int(min(number, trainer.num_training_batches)))
    )  # synchronised norms wait for each other
    for network in networks:
        with forward_context(trainer):
            used = recalibrate_(network, islice(train_inputs(trainer, network), number))
        for norm in tracked_norms(network):
            for buffer in (norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
                average_(buffer, used)


#: a batch, its number, and that of its loader; None: there is but one
Indexed = tuple[Any, int, int | None]


def moved(trainer: L.Trainer, batch: Any, device: torch.device, loader: int = 0) -> Any:
    """A batch on ``device``, after all that precision, module and data module do to it on its way."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, device, dataloader_idx=loader)


def train_batches(trainer: L.Trainer, device: torch.device) -> Iterator[Any]:
    """One pass over the training data, of one loader or several, as far as an epoch goes."""
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return
    for batch, number, _ in CombinedLoader(combined.iterables, combined._mode):
        if number >= trainer.num_training_batches:
            break
        yield moved(trainer, batch, device)


def held_batches(
    trainer: L.Trainer, loaders: Any, device: torch.device, number: int | None = None
) -> list[Indexed]:
    """One pass over one loader or several, one after the other, as validation sees them, or ``number`` of each."""
    combined = CombinedLoader(loaders, "sequential")
    most = math.inf if number is None else number
    limits = (
        trainer.num_val_batches
        if loaders is trainer.val_dataloaders
        else [math.inf] * len(combined.flattened)
    )
    combined.limits = [min(limit, most) for limit in limits]
    several = len(combined.flattened) > 1
    with _validating(trainer):
        return [
            (moved(trainer, batch, device, loader), index, loader if several else None)
            for batch, index, loader in combined
        ]


@contextmanager
def _validating(trainer: L.Trainer) -> Iterator[None]:
    """Hooks that augment while training let these batches be."""
    before, trainer.state.stage = trainer.state.stage, RunningStage.VALIDATING
    try:
        with switched(trainer.lightning_module, lambda module: False):
            yield
    finally:
        trainer.state.stage = before
