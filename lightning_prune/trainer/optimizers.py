"""Rebuild optimizers, schedulers and the distributed wrapper after a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from lightning_prune.trainer.lightning_internals import expect_first_backward
from lightning_prune.trainer.weight_averaging import rebind_swa_


def rebuild_optimizers_(trainer: L.Trainer, added: bool = True) -> None:
    """Replace the trainer's optimizers and schedulers by new ones from ``configure_optimizers``.

    Args:
        trainer: holds the optimizers and schedulers.
        added: also copy the parameter groups that callbacks have added to the old optimizers.

    Raises:
        ValueError: the number of optimizers has changed.
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
    rebind_swa_(trainer, schedulers)


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
