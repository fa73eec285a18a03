"""Moving averages of the weights follow the cut (level 4).

Lightning's callbacks and ``torch.optim.swa_utils.AveragedModel`` keep a copy of the network and walk through both
tensor by tensor, so the copy must lose what the network loses, at the same moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.serialization.record import PruningRecord, rerooted
from lightning_prune.trainer.training_state import callbacks_of
from lightning_prune.utils.modules import named_tensors

__all__ = [
    "Average",
    "averages",
    "check_target",
    "counterparts",
    "moving",
    "rebind_swa_",
    "rerooted",
    "swa_is_over",
]


@dataclass(frozen=True)
class Average:
    """A copy of a network, or of a part of it, that holds averaged weights.

    Attributes:
        module: the copy.
        of: qualified name of the original in the LightningModule, ``""`` for the whole.
    """

    module: nn.Module
    of: str

    def part(self, record: PruningRecord, submodule: str | None) -> PruningRecord:
        """What a record of the LightningModule's ``submodule`` says about this copy."""
        return rerooted(record, submodule or "", self.of)


def averages(trainer: L.Trainer, pl_module: L.LightningModule) -> list[Average]:
    """Every averaged copy of ``pl_module`` or of a part of it, in callbacks and in the module itself.

    Copies are recognised by class and shapes: call this before the original is cut. An average of something else
    is left out.

    Raises:
        ValueError: a copy could be that of several parts.
    """
    held = [_original(copy, pl_module) for copy in _in_callbacks(trainer)]
    found = [average for average in held if average is not None]
    for root in (pl_module, *(average.module for average in found if not average.of)):
        inside = (_original(averaged.module, root) for _, averaged in _averaged(root))
        found += [average for average in inside if average is not None]
    return found


def moving(trainer: L.Trainer, pl_module: L.LightningModule) -> list[Average]:
    """The :func:`averages` that are kept while training goes on, and were updated at least once."""
    averaged = [*_held_by_callbacks(trainer), *(module for _, module in _averaged(pl_module))]
    begun = {id(each.module) for each in averaged if int(each.n_averaged)}
    return [average for average in averages(trainer, pl_module) if id(average.module) in begun]


def swa_is_over(trainer: L.Trainer) -> bool:
    """Whether stochastic weight averaging has put the average in place, and the last epoch only renews norms."""
    return any(swa.swa_end < trainer.current_epoch for swa in _swa(trainer) if swa._max_epochs != -1)


def rebind_swa_(trainer: L.Trainer, schedules: list[Any]) -> None:
    """Let the schedule of stochastic weight averaging go on with fresh optimizers.

    Args:
        trainer: its optimizers are new.
        schedules: the configurations of its schedulers before.
    """
    for swa in _swa(trainer):
        if swa._swa_scheduler is not None:
            for group, old in zip(
                trainer.optimizers[0].param_groups, swa._swa_scheduler.optimizer.param_groups, strict=True
            ):
                group.update({key: value for key, value in old.items() if key != "params"})
            swa._swa_scheduler.optimizer = trainer.optimizers[0]
            trainer.strategy.lr_scheduler_configs = schedules


def counterparts(found: Sequence[Average], submodule: str | None) -> list[nn.Module]:
    """What corresponds to the LightningModule's ``submodule`` in each copy that holds it."""
    target = submodule or ""
    holding = [a for a in found if f"{target}.".startswith(f"{a.of}.") or not a.of]
    return [a.module.get_submodule(target.removeprefix(a.of).removeprefix(".")) for a in holding]


def check_target(target: nn.Module) -> None:
    """Raise ValueError if the network to prune holds an average: it would count, and be read, as a part of it."""
    for name, averaged in _averaged(target):
        original = _original(averaged.module, target)
        if original is not None:
            hint = f"set submodule={original.of!r}" if original.of else "keep it elsewhere"
            raise ValueError(
                f"{name!r} is an average of {original.of or 'the module'!r}; {hint}, so that only the network "
                "itself is traced and counted, and the average is cut along"
            )


def _in_callbacks(trainer: L.Trainer) -> Iterator[nn.Module]:
    yield from (swa._average_model for swa in _swa(trainer) if swa._average_model is not None)
    yield from (averaged.module for averaged in _held_by_callbacks(trainer))


def _held_by_callbacks(trainer: L.Trainer) -> list[AveragedModel]:
    held = [value for callback in callbacks_of(trainer) for value in vars(callback).values()]
    return [value for value in held if isinstance(value, AveragedModel)]


def _swa(trainer: L.Trainer) -> list[StochasticWeightAveraging]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, StochasticWeightAveraging)]


def _averaged(root: nn.Module) -> list[tuple[str, AveragedModel]]:
    return [(name, module) for name, module in root.named_modules() if isinstance(module, AveragedModel)]


def _original(copy: nn.Module, root: nn.Module) -> Average | None:
    """``copy`` with the name of what it is a copy of within ``root``; the outermost if one holds nothing else."""
    inside = tuple(f"{name}." for name, _ in _averaged(root))
    shapes = _shapes(copy)
    names = [
        name
        for name, module in root.named_modules()
        if type(module) is type(copy) and not name.startswith(inside) and _shapes(module) == shapes
    ]
    if len(names) > 1:
        raise ValueError(
            f"an average of a {type(copy).__name__} could be that of {' or of '.join(map(repr, names))}; average "
            "the module that holds them instead"
        )
    return Average(copy, names[0]) if names else None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named_tensors(module).items()}
