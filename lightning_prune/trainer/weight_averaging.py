"""Averaged copies of the weights, found in callbacks and modules so that cuts reach them.

Lightning's callbacks and ``torch.optim.swa_utils.AveragedModel`` keep a copy of the network and update it tensor by
tensor. The copy must therefore lose the same channels as the network, at the same moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.serialization.record import PruningRecord, rerooted
from lightning_prune.trainer.lightning_internals import (
    callbacks_of,
    swa_average,
    swa_last_epoch,
    swa_scheduler,
)
from lightning_prune.utils.modules import is_within, named_shapes

__all__ = [
    "AveragedCopy",
    "active_averages",
    "averaged_copies",
    "check_no_average_inside",
    "rebind_swa_",
    "submodules_in_copies",
    "swa_has_ended",
]


@dataclass(frozen=True)
class AveragedCopy:
    """A copy of a network, or of a part of it: an average, or another copy that is cut along.

    Attributes:
        module: the copy.
        original: qualified name of the original in the LightningModule, ``""`` for the whole.
    """

    module: nn.Module
    original: str

    def record_for(self, record: PruningRecord, submodule: str | None) -> PruningRecord:
        """Return a record of the LightningModule's ``submodule`` as the record of this copy."""
        return rerooted(record, submodule or "", self.original)

    def counterpart(self, name: str) -> nn.Module | None:
        """Return the module of this copy that stands for ``name`` of the LightningModule; None if that is outside."""
        if not is_within(name, self.original):
            return None
        return self.module.get_submodule(name.removeprefix(self.original).removeprefix("."))


def averaged_copies(trainer: L.Trainer, pl_module: L.LightningModule) -> list[AveragedCopy]:
    """Return all averaged copies of ``pl_module`` or of its parts, in callbacks and in the module itself.

    Copies are matched to originals by class and shapes: call this before the original is cut. An average that
    matches nothing is left out.

    Raises:
        ValueError: a copy matches several parts.
    """
    copies = _matched(_averages_in_callbacks(trainer), pl_module)
    # A copy of the whole module contains copies of the averages inside the module, which are cut as well.
    roots = [pl_module, *(copy.module for copy in copies if not copy.original)]
    for root in roots:
        copies += _matched((averaged.module for _, averaged in _averaged_models(root)), root)
    return copies


def active_averages(trainer: L.Trainer, pl_module: L.LightningModule) -> list[AveragedCopy]:
    """Return the :func:`averaged_copies` in an ``AveragedModel`` that was updated at least once."""
    models = [*_models_of_callbacks(trainer), *(module for _, module in _averaged_models(pl_module))]
    updated = {id(model.module) for model in models if int(model.n_averaged)}
    return [copy for copy in averaged_copies(trainer, pl_module) if id(copy.module) in updated]


def swa_has_ended(trainer: L.Trainer) -> bool:
    """Return whether stochastic weight averaging has replaced the weights, and the last epoch only renews norms."""
    last_epochs = [swa_last_epoch(swa) for swa in _swa_callbacks(trainer)]
    return any(last is not None and last < trainer.current_epoch for last in last_epochs)


def rebind_swa_(trainer: L.Trainer, schedulers: list[Any]) -> None:
    """Have the scheduler of stochastic weight averaging continue with new optimizers.

    Args:
        trainer: holds the new optimizers.
        schedulers: the trainer's scheduler configurations before the optimizers were replaced.
    """
    for scheduler in filter(None, map(swa_scheduler, _swa_callbacks(trainer))):
        optimizer = trainer.optimizers[0]
        for group, old in zip(optimizer.param_groups, scheduler.optimizer.param_groups, strict=True):
            # The scheduler stores learning rates in the groups of its optimizer.
            group.update({key: value for key, value in old.items() if key != "params"})
        scheduler.optimizer = optimizer
        trainer.strategy.lr_scheduler_configs = schedulers


def submodules_in_copies(copies: Sequence[AveragedCopy], submodule: str | None) -> list[nn.Module]:
    """Return the counterpart of the LightningModule's ``submodule`` in each copy that contains it."""
    return [part for copy in copies if (part := copy.counterpart(submodule or "")) is not None]


def check_no_average_inside(target: nn.Module) -> None:
    """Raise ValueError if the network to prune contains an average of itself, which would be traced as its part."""
    for name, averaged in _averaged_models(target):
        copy = _match(averaged.module, target)
        if copy is not None:
            hint = f"set submodule={copy.original!r}" if copy.original else "keep it elsewhere"
            raise ValueError(
                f"{name!r} is an average of {copy.original or 'the module'!r}; {hint}, so that only the network "
                "itself is traced and counted; the average is cut along with it"
            )


def _averages_in_callbacks(trainer: L.Trainer) -> Iterator[nn.Module]:
    yield from (average for swa in _swa_callbacks(trainer) if (average := swa_average(swa)) is not None)
    yield from (averaged.module for averaged in _models_of_callbacks(trainer))


def _models_of_callbacks(trainer: L.Trainer) -> list[AveragedModel]:
    attributes = [value for callback in callbacks_of(trainer) for value in vars(callback).values()]
    return [value for value in attributes if isinstance(value, AveragedModel)]


def _swa_callbacks(trainer: L.Trainer) -> list[StochasticWeightAveraging]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, StochasticWeightAveraging)]


def _averaged_models(root: nn.Module) -> list[tuple[str, AveragedModel]]:
    return [(name, module) for name, module in root.named_modules() if isinstance(module, AveragedModel)]


def _matched(copies: Iterator[nn.Module], root: nn.Module) -> list[AveragedCopy]:
    return [match for copy in copies if (match := _match(copy, root)) is not None]


def _match(copy: nn.Module, root: nn.Module) -> AveragedCopy | None:
    """Return ``copy`` with the name of its original within ``root``: the module of equal class and shapes.

    Names of tensors are compared as well, so that a module and its only child do not both match.
    """
    inside_averages = tuple(f"{name}." for name, _ in _averaged_models(root))
    shapes = named_shapes(copy)
    names = [
        name
        for name, module in root.named_modules()
        if type(module) is type(copy)
        and not name.startswith(inside_averages)
        and named_shapes(module) == shapes
    ]
    if len(names) > 1:
        raise ValueError(
            f"an average of a {type(copy).__name__} could be that of {' or of '.join(map(repr, names))}; average "
            "the module that holds them instead"
        )
    return AveragedCopy(copy, names[0]) if names else None
