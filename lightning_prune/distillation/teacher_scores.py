"""How good the teacher is, by the student's own validation (level 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_prune.trainer.lightning_internals import call_callbacks, forget_logged, reset_loop
from lightning_prune.trainer.training_state import callbacks_of

__all__ = ["Scores", "measure", "swapped"]

_REGISTERED = ("_modules", "_parameters", "_buffers")


class Scores:
    """The teacher's validation metrics, and the one that decides.

    Args:
        metric: its name; None: what a callback monitors, else the first.
        mode: whether it should rise; None: not if it is a loss or an error.

    Attributes:
        found: metric -> value; empty before it was measured.

    Example:
        >>> scores = Scores("val/miou")
        >>> scores.found = {"val/miou": 0.6}
        >>> scores.worse_than({"val/miou": 0.7})
        "the teacher is worse than its student: val/miou 0.6, the student's 0.7; train the teacher to its end"
    """

    def __init__(self, metric: str | None = None, mode: Literal["max", "min"] | None = None) -> None:
        self.metric, self.mode = metric, mode
        self.found: dict[str, float] = {}
        self.told = False

    def name(self, trainer: L.Trainer | None = None) -> str | None:
        """The metric that decides, None if there is none."""
        callbacks = callbacks_of(trainer) if trainer else []
        monitored = [getattr(callback, "monitor", None) for callback in callbacks]
        wanted = [self.metric] if self.metric else [*monitored, *self.found]
        return next((name for name in wanted if name in self.found), None)

    def worse_than(self, student: Mapping[str, float], trainer: L.Trainer | None = None) -> str | None:
        """What to say, the first time that the student is better."""
        name = self.name(trainer)
        if self.told or name is None or name not in student:
            return None
        falls = self.mode == "min" or (self.mode is None and ("loss" in name or "error" in name))
        ours, theirs = student[name], self.found[name]
        if (ours >= theirs) if falls else (ours <= theirs):
            return None
        self.told = True
        return (
            f"the teacher is worse than its student: {name} {theirs:.4g}, the student's {ours:.4g}; train the "
            "teacher to its end"
        )


def measure(trainer: L.Trainer) -> dict[str, float]:
    """Run the whole validation once, unseen by loggers, checkpoints and early stopping.

    As Lightning does for its sanity check. Empty where there is no validation.
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
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            call_callbacks(trainer, "on_sanity_check_end")
    finally:
        forget_logged(trainer)
        reset_loop(loop)
        trainer.num_sanity_val_steps, trainer.state.stage = steps, stage
    return found


@contextmanager
def swapped(pl_module: L.LightningModule, submodule: str | None, teacher: nn.Module) -> Iterator[None]:
    """The teacher in the student's place: as the submodule, or by what is registered in the whole module."""
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
        with _registered(pl_module, teacher):
            yield


@contextmanager
def _registered(pl_module: L.LightningModule, teacher: nn.Module) -> Iterator[None]:
    before = {name: vars(pl_module)[name] for name in _REGISTERED}
    vars(pl_module).update({name: vars(teacher)[name] for name in _REGISTERED})
    try:
        yield
    finally:
        vars(pl_module).update(before)
