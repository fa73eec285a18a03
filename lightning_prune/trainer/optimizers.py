"""Rebuild optimizers, schedulers and the distributed wrapper after a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_prune.trainer.lightning_internals import expect_first_backward
from lightning_prune.trainer.weight_averaging import rebind_swa_


def rebuild_optimizers_(trainer: L.Trainer, added: bool = True, keeps_schedulers: bool = False) -> None:
    """Replace the trainer's optimizers and schedulers by new ones from ``configure_optimizers``.

    Args:
        trainer: holds the optimizers and schedulers.
        added: also copy the parameter groups that callbacks have added to the old optimizers.
        keeps_schedulers: give the new optimizers the options of the old ones, such as the learning rate, and the new
            schedulers the state of the old ones.

    Raises:
        ValueError: the number of optimizers has changed, or ``configure_optimizers`` returns an old one that must not
            step again.
    """
    before, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
    trainer.strategy.setup_optimizers(trainer)
    if len(before) != len(trainer.optimizers):
        raise ValueError(
            f"configure_optimizers returns {len(trainer.optimizers)} optimizers, {len(before)} when training began"
        )
    if added:
        for old, new in zip(before, trainer.optimizers, strict=True):
            _add_groups_(new, old.param_groups[len(new.param_groups) :])
    if keeps_schedulers:
        _continue_schedules_(trainer, before, schedulers)
    rebind_swa_(trainer, schedulers)


def _continue_schedules_(
    trainer: L.Trainer, optimizers: Sequence[Optimizer], schedulers: Sequence[LRSchedulerConfig]
) -> None:
    """Give new optimizers and schedulers the options and counters of those before."""
    for old, new in zip(optimizers, trainer.optimizers, strict=True):
        if old is new:
            raise ValueError(
                f"configure_optimizers returned the same {type(old).__name__} again, which holds tensors of the "
                "sizes before the cut: build a new optimizer in it"
            )
        for before, group in zip(old.param_groups, new.param_groups, strict=True):
            group |= {key: value for key, value in before.items() if _is_option(value)}
    for config, new_config in zip(schedulers, trainer.lr_scheduler_configs, strict=True):
        new_config.scheduler.load_state_dict(config.scheduler.state_dict())


def _is_option(value: Any) -> bool:
    """Whether an entry of a parameter group is a setting, not something that is kept for each parameter."""
    numbers = isinstance(value, tuple) and all(isinstance(each, (int, float)) for each in value)
    return value is None or numbers or isinstance(value, (bool, int, float, str))


def _add_groups_(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Add groups that a callback made when it unfroze parameters, and take these out of the other groups.

    So they keep the learning rate that the callback gave them.
    """
    for group in groups:
        added = {id(parameter) for parameter in group["params"]}
        for other in optimizer.param_groups:
            other["params"] = [parameter for parameter in other["params"] if id(parameter) not in added]
        optimizer.add_param_group(dict(group))


def rebuild_wrapper_(trainer: L.Trainer) -> None:
    """Wrap the module in DistributedDataParallel again, with the same arguments: the old one has the old shapes."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.lightning_module
        expect_first_backward(trainer.strategy)
        trainer.strategy.configure_ddp()
