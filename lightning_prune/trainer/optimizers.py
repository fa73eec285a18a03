"""NEW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from lightning_prune.trainer.weight_averaging import rebind_swa_


def fresh_optimizers_(trainer: L.Trainer, added: bool = True) -> None:
    """Optimizers and schedulers anew, as the module configures them.

    Args:
        trainer: whose they are.
        added: with the parameter groups that callbacks have added since.

    Raises:
        ValueError: there are more or fewer optimizers than before.
    """
    before, schedules = trainer.optimizers, trainer.lr_scheduler_configs
    trainer.strategy.setup_optimizers(trainer)
    if len(before) != len(trainer.optimizers):
        raise ValueError(
            f"{len(trainer.optimizers)} optimizers were built, training began with {len(before)}"
        )
    for old, fresh in zip(before, trainer.optimizers, strict=True) if added else ():
        _add_groups_(fresh, old.param_groups[len(fresh.param_groups) :])
    rebind_swa_(trainer, schedules)


def _add_groups_(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Parameter groups that a callback added, when it unfroze them, get back their own learning rate."""
    for group in groups:
        added = {id(parameter) for parameter in group["params"]}
        for own in optimizer.param_groups:
            own["params"] = [parameter for parameter in own["params"] if id(parameter) not in added]
        optimizer.add_param_group(dict(group))


def rebuild_wrapper_(trainer: L.Trainer) -> None:
    """DistributedDataParallel remembers the old shapes: wrap the smaller module anew, same arguments."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.lightning_module
        trainer.strategy._pl_static_graph_delay_done = False  # of a static graph's first backward, by hand
        trainer.strategy.configure_ddp()
