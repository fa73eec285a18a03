"""What is wrong with a trainer, or a callback's place in it, said before training (level 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.pruning.schedules import Timing
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import has_shapes_of
from lightning_prune.utils.distributed import gathered

__all__ = ["check_alone", "check_batches", "check_record", "check_strategy", "check_timing", "check_trained"]


def check_strategy(trainer: L.Trainer) -> None:
    """Raise NotImplementedError where parameters do not lie whole on every device."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):  # which is a DDPStrategy by name only
        name = type(trainer.strategy).__name__
        raise NotImplementedError(
            f'{name} spreads or wraps parameters in a way that cannot be cut; use Trainer(strategy="ddp")'
        )


def check_alone(pruning: Sequence[L.Callback]) -> None:
    """Raise ValueError if several callbacks prune one network: neither would know what the other cut."""
    if len(pruning) > 1:
        names = " and ".join(type(callback).__name__ for callback in pruning)
        raise ValueError(
            f"one callback prunes in a Trainer, here are {names}; prune with one after the other"
        )


def check_record(target: nn.Module, record: PruningRecord | None) -> None:
    """Raise ValueError if a callback has cut another network than ``target``."""
    if record is not None and not has_shapes_of(target, record):
        raise ValueError(
            "this callback has pruned a network of other sizes; give a fresh network a new callback, or resume from "
            "the checkpoint of that run"
        )


def check_batches(trainer: L.Trainer) -> None:
    """Raise ValueError where processes have different numbers of training batches: Lightning would wait for ever."""
    numbers = gathered(trainer.num_training_batches)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, numbers))} training batches, and Lightning's ranks wait for each "
            f"other at every batch; set Trainer(limit_train_batches={min(numbers)})"
        )


def check_timing(trainer: L.Trainer, timing: Timing, in_a_pass: bool) -> None:
    """Find out before training whether cuts come as they are meant to.

    Raises:
        ValueError: a pass over the training data would break off the epoch under way.
    """
    loaders = tree_leaves(trainer.train_dataloader)
    if timing.by_steps and in_a_pass and any(getattr(x, "persistent_workers", False) for x in loaders):
        raise ValueError(
            "a pass over the training data within an epoch would restart its persistent workers; set "
            'persistent_workers=False of the loader, or gather statistics="epoch"'
        )
    last = _last(trainer, timing)
    if timing.schedule is not None and last is not None:
        shares = [timing.share(now) or 0 for now in range(timing.start, last + 1, timing.every)]
        if 1 not in shares:
            rank_zero_warn(
                f"the schedule ends too late: of what has to go, {max(shares, default=0):.0%} is gone after the last "
                f"cut before training ends, after {last} {timing.unit}; train for longer, cut earlier or more often, "
                "or in fewer cuts"
            )


def _last(trainer: L.Trainer, timing: Timing) -> int | None:
    """The last epoch, or number of steps, that training comes to; None if it is not known."""
    epochs, steps = trainer.max_epochs if trainer.max_epochs is not None else -1, trainer.max_steps
    if not timing.by_steps:
        return epochs - 1 if epochs >= 0 else None
    batches = epochs * trainer.num_training_batches // trainer.accumulate_grad_batches
    known = [int(number) for number in (steps, batches) if 0 <= number < math.inf]
    return min(known, default=None)


def check_trained(trainer: L.Trainer) -> None:
    """Raise ValueError if there was no batch: Lightning then stops in silence."""
    if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
        raise ValueError("the training data loader has no batches: nothing was trained and nothing pruned")
