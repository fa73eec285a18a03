"""Checks of a trainer and its callbacks before training starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_prune.pruning.schedules import Timing
from lightning_prune.utils.distributed import gather_all

__all__ = [
    "check_alone",
    "check_batches",
    "check_resume",
    "check_strategy",
    "check_timing",
    "check_trained",
    "explain_resume",
]


def check_strategy(trainer: L.Trainer) -> None:
    """Raise NotImplementedError if the trainer's strategy shards parameters in a way that cannot be cut."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):  # a subclass of DDPStrategy that shards
        name = type(trainer.strategy).__name__
        raise NotImplementedError(
            f'{name} shards or wraps parameters in a way that cannot be cut; use Trainer(strategy="ddp"), or '
            "ModelParallelStrategy and fully_shard in configure_model"
        )


SHARDED_RESUME = (
    "ModelParallelStrategy loads weights before the network can be given their sizes, so that a training that is "
    'pruned cannot be resumed under it: use Trainer(strategy="ddp"), or a Pruner in a loop of your own, which loads '
    "its state before fully_shard"
)


def check_resume(trainer: L.Trainer) -> None:
    """Raise NotImplementedError if Lightning loads a checkpoint's weights before the network can be cut."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise NotImplementedError(SHARDED_RESUME)


def explain_resume(trainer: L.Trainer, error: BaseException) -> None:
    """Add a note to the error with which torch refuses sharded weights of other sizes."""
    if isinstance(trainer.strategy, ModelParallelStrategy) and "size mismatch" in str(error).lower():
        error.add_note(SHARDED_RESUME)


def check_alone(pruning: Sequence[L.Callback]) -> None:
    """Raise ValueError if several callbacks prune one network: none of them would follow the others' cuts."""
    if len(pruning) > 1:
        names = " and ".join(type(callback).__name__ for callback in pruning)
        raise ValueError(
            f"a Trainer can have one pruning callback, got {names}; prune with one after the other"
        )


def check_batches(trainer: L.Trainer) -> None:
    """Raise ValueError if processes have different numbers of training batches: training would never end."""
    numbers = gather_all(trainer.num_training_batches)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"the ranks have {', '.join(map(str, numbers))} training batches, but Lightning's ranks wait for each "
            f"other at every batch; set Trainer(limit_train_batches={min(numbers)})"
        )


def has_persistent_workers(trainer: L.Trainer) -> bool:
    """Return whether a second pass over the training data would restart the workers of the present one."""
    loaders = tree_leaves(trainer.train_dataloader)
    return any(getattr(loader, "persistent_workers", False) for loader in loaders)


def check_recalibration(trainer: L.Trainer, timing: Timing, batches: int | None) -> None:
    """Raise ValueError if the recalibration of batch norms would restart the workers of the present epoch."""
    if timing.by_steps and batches and has_persistent_workers(trainer):
        raise ValueError(
            f"recalibrate_batches={batches} within an epoch would restart its persistent workers; set "
            "persistent_workers=False of the loader, or recalibrate_batches=0"
        )


def check_timing(trainer: L.Trainer, timing: Timing, in_a_pass: bool) -> None:
    """Check that cuts can be made when they are due; warn if a schedule is not completed before training ends.

    Args:
        trainer: its loaders and its number of epochs and steps are read.
        timing: when cuts are due.
        in_a_pass: whether statistics are gathered in a separate pass over the training data.

    Raises:
        ValueError: a separate pass within an epoch would restart the workers of a training loader.
    """
    if timing.by_steps and in_a_pass and has_persistent_workers(trainer):
        raise ValueError(
            "a pass over the training data within an epoch would restart its persistent workers; set "
            'persistent_workers=False of the loader, or gather statistics="epoch"'
        )
    end = _last_cut_time(trainer, timing)
    if timing.schedule is not None and end is not None:
        # Rehearse the schedule: the last cut before the end of training must remove all that is left to remove.
        shares = [timing.share(now) or 0 for now in range(timing.start, end + 1, timing.every)]
        if 1 not in shares:
            rank_zero_warn(
                f"the schedule ends too late: {max(shares, default=0):.0%} of its total is removed by the "
                f"last cut before training ends, after {end} {timing.unit}; train for longer, cut earlier or more "
                "often, or in fewer cuts"
            )


def _last_cut_time(trainer: L.Trainer, timing: Timing) -> int | None:
    """Return the index of the last epoch, or the last number of steps; None if it is not known in advance."""
    epochs, steps = trainer.max_epochs if trainer.max_epochs is not None else -1, trainer.max_steps
    if not timing.by_steps:
        return epochs - 1 if epochs >= 0 else None
    steps_of_epochs = epochs * trainer.num_training_batches // trainer.accumulate_grad_batches
    limits = [int(number) for number in (steps, steps_of_epochs) if 0 <= number < math.inf]
    return min(limits, default=None)


def check_trained(trainer: L.Trainer) -> None:
    """Raise ValueError if no batch was trained on: Lightning skips an empty training loader without an error."""
    if trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
        raise ValueError("the training data loader has no batches: nothing was trained and nothing pruned")
