"""Validation metrics of the teacher, measured with the student's own validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_prune.trainer.lightning_internals import (
    call_callbacks,
    callbacks_of,
    forget_logged,
    reset_loop,
)
from lightning_prune.utils.metrics import higher_is_better

__all__ = ["TeacherScores", "measure_scores", "replace_student"]

_REGISTRIES = ("_modules", "_parameters", "_buffers")


class TeacherScores:
    """The teacher's validation metrics, and the metric by which it is compared with the student.

    Args:
        metric: name of that metric; None: the one that a callback monitors, else the first.
        mode: ``"max"`` or ``"min"``, whichever is better; None: ``"min"`` for losses and errors, else ``"max"``.

    Attributes:
        values: metric -> value; empty before the measurement.

    Example:
        >>> scores = TeacherScores("val/miou")
        >>> scores.values = {"val/miou": 0.6}
        >>> scores.warning({"val/miou": 0.7})
        "the teacher is worse than its student: val/miou 0.6, the student's 0.7; train the teacher longer"
    """

    def __init__(self, metric: str | None = None, mode: Literal["max", "min"] | None = None) -> None:
        self.metric, self.mode = metric, mode
        self.values: dict[str, float] = {}
        self._warned = False

    def metric_name(self, trainer: L.Trainer | None = None) -> str | None:
        """Return the name of the metric that decides; None if the teacher's value of it is unknown."""
        callbacks = callbacks_of(trainer) if trainer else []
        monitored = [getattr(callback, "monitor", None) for callback in callbacks]
        names = [self.metric] if self.metric else [*monitored, *self.values]
        return next((name for name in names if name in self.values), None)

    def warning(self, student: Mapping[str, float], trainer: L.Trainer | None = None) -> str | None:
        """Return a warning the first time that the student is better than the teacher, else None."""
        name = self.metric_name(trainer)
        if self._warned or name is None or name not in student:
            return None
        ours, theirs = student[name], self.values[name]
        if (ours <= theirs) if higher_is_better(name, self.mode) else (ours >= theirs):
            return None
        self._warned = True
        return (
            f"the teacher is worse than its student: {name} {theirs:.4g}, the student's {ours:.4g}; train the "
            "teacher longer"
        )


def measure_scores(trainer: L.Trainer) -> dict[str, float]:
    """Run the whole validation once and return its metrics; return nothing if there is no validation.

    It runs in the way of Lightning's sanity check, so that loggers, checkpoints and early stopping ignore it.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.enable_validation:
        return {}
    stage, steps = trainer.state.stage, trainer.num_sanity_val_steps
    trainer.sanity_checking = True
    trainer.num_sanity_val_steps = float("inf")
    try:
        with isolate_rng():
            call_callbacks(trainer, "on_sanity_check_start")
            loop.run()
            scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
            call_callbacks(trainer, "on_sanity_check_end")
    finally:
        forget_logged(trainer)
        reset_loop(loop)
        trainer.num_sanity_val_steps, trainer.state.stage = steps, stage
    return scores


@contextmanager
def replace_student(
    pl_module: L.LightningModule, submodule: str | None, teacher: nn.Module
) -> Iterator[None]:
    """Put the teacher in the place of the student inside the block.

    Args:
        pl_module: module of the student.
        submodule: name of the student in it; None: the module itself, whose children, parameters and buffers are
            replaced by those of the teacher.
        teacher: network with the same inputs and outputs.
    """
    if submodule:
        parent, _, name = submodule.rpartition(".")
        owner = pl_module.get_submodule(parent)
        student = getattr(owner, name)
        setattr(owner, name, teacher)
        try:
            yield
        finally:
            setattr(owner, name, student)
    else:
        with _replace_registries(pl_module, teacher):
            yield


@contextmanager
def _replace_registries(pl_module: L.LightningModule, teacher: nn.Module) -> Iterator[None]:
    before = {name: vars(pl_module)[name] for name in _REGISTRIES}
    vars(pl_module).update({name: vars(teacher)[name] for name in _REGISTRIES})
    try:
        yield
    finally:
        vars(pl_module).update(before)
