"""Exact continuation of an interrupted training run: what Lightning itself does not restore.

Lightning 2.6 restores weights, optimizers, schedulers and its counters. It does not restore random states. Within an
epoch it starts the data from the beginning again. After a checkpoint from the end of a training batch it skips the
validation that should follow and, after the last batch, the end of the epoch. A plateau scheduler misses its step
for an epoch that ended with the checkpoint. :class:`Resumption` corrects all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_prune.pruning.calibration import generators_of_loaders
from lightning_prune.trainer import lightning_internals as internals
from lightning_prune.trainer.lightning_internals import callbacks_of
from lightning_prune.utils.distributed import gather_all
from lightning_prune.utils.seeding import random_state, set_random_state

__all__ = ["Resumption", "is_within_batch", "session_of_rank"]


def generators_of(trainer: L.Trainer) -> list[torch.Generator]:
    """Return the generators that the user passed to data loaders and samplers, each once."""
    loaders = tree_leaves([trainer.train_dataloader, trainer.val_dataloaders])
    return generators_of_loaders(loaders)


class Resumption:
    """Saves and restores the state of training that Lightning does not; a callback calls its hooks.

    A checkpoint may come from any hook of Lightning's ``ModelCheckpoint``: the end of a training batch, of a
    validation, of an epoch. Each rank restores its own random states, its position in the epoch's data (batches
    before it are drawn again and dropped), metrics that other callbacks monitor, and a plateau scheduler's step.

    Not restored: random states inside ``persistent_workers``, the sums of metrics logged with
    ``on_epoch=True`` in the part of the epoch before the checkpoint, gradients of an incomplete accumulation.
    The position in loaders with a ``state_dict`` is restored by Lightning.
    """

    def __init__(self) -> None:
        self._epoch_start: dict[str, Any] | None = (
            None  # random state from which this epoch's batches are drawn
        )
        self._before_batch: Any = (
            None  # random state from which the next batch is drawn; None: the epoch's first
        )
        self._interrupted: dict[str, Any] = {}  # after an exception: the random state to continue with
        self._loaded: Mapping[str, Any] | None = None  # result of `save`, until it is restored
        self._batch_ended = self._epoch_ended = False  # which hook the checkpoint came from

    def save(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the entry for a checkpoint, as tensors and plain values. All processes must call it."""
        now = self._interrupted["now"] if self._interrupted else random_state(generators_of(trainer))
        metrics = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
        ranks = gather_all({"start": self._epoch_start, "now": now})
        return {"epoch": trainer.current_epoch, "ranks": ranks, "metrics": metrics}

    def load(self, trainer: L.Trainer, saved: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take the result of :meth:`save`, and correct ``checkpoint`` before Lightning restores its loops from it."""
        if len(saved["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was written by {len(saved['ranks'])} processes, now there are {trainer.world_size}: "
                "training continues with other random numbers, and statistics of activations and gradients begin anew"
            )
            saved = {**saved, "ranks": [{"start": None, "now": None}] * trainer.world_size}
        self._loaded = saved
        loops = checkpoint["loops"]["fit_loop"]
        self._batch_ended = _complete_batch_(loops)
        self._epoch_ended = _is_at_its_end(loops["epoch_progress"]["total"])

    def on_fit_start(self, trainer: L.Trainer) -> None:
        """Restore or note the random state from which the batches of epoch 0 are drawn."""
        if self._loaded is not None and self._loaded["epoch"] == 0 and self._saved_start(trainer):
            set_random_state(self._saved_start(trainer))
        elif trainer.current_epoch == 0 or self._loaded is not None:
            self._epoch_start = random_state()

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Restore metrics, and the position in the data if the checkpoint was written within an epoch."""
        if self._loaded is None:
            return
        trainer.callback_metrics.update(self._loaded["metrics"])
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
            saved_start = self._saved_start(trainer)
            self._epoch_start = saved_start or self._epoch_start
            start = saved_start if self._loaded["epoch"] else None  # on_fit_start has restored epoch 0
            _skip_batches(trainer, start, self._batch_ended)
            self._restore(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer) -> None:
        """Restore random states if the checkpoint was written between two epochs."""
        if self._loaded is not None:
            self._step_schedulers(trainer)
            self._restore(trainer)
            # An uninterrupted run draws the batches of an epoch after this hook; a resumed one must do so, too.
            internals.fetch_after_epoch_start(trainer)
        self._before_batch = None
        if trainer.current_epoch > 0:
            self._epoch_start = random_state(generators_of(trainer))

    def before_batch(self, trainer: L.Trainer) -> None:
        """Note the random state from which the next batch will be drawn."""
        self._before_batch = random_state(generators_of(trainer))

    def on_exception(self, trainer: L.Trainer) -> None:
        """Continue with the batch that the exception has ended, or kept from being drawn."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        is_drawn = not progress.is_last_batch and not is_batch_complete(trainer)
        if trainer.training and (is_within_batch(trainer) or is_drawn):
            self._interrupted = {"now": self._before_batch}

    def on_train_epoch_end(self, trainer: L.Trainer) -> None:
        """Have Lightning step plateau schedulers: after a restart it skips them, as if their metrics were missing."""
        internals.end_restart(trainer)

    def on_fit_end(self, trainer: L.Trainer) -> None:
        """Restore what is still to be restored: if no epoch was left to train, no other hook was called."""
        if self._loaded is not None:
            self._step_schedulers(trainer)
            self._restore(trainer)
            # Lightning calls no hook of the training's end either, in which averages become the module's weights.
            for callback in callbacks_of(trainer):
                if isinstance(callback, WeightAveraging):
                    callback.on_train_end(trainer, trainer.lightning_module)

    @property
    def between_epochs(self) -> bool:
        """Whether the next ``on_train_epoch_start`` follows the checkpoint of a finished epoch."""
        return self._loaded is not None

    def _step_schedulers(self, trainer: L.Trainer) -> None:
        """Step plateau schedulers: checkpoints of an epoch's end are written before Lightning steps them."""
        assert self._loaded is not None
        if self._epoch_ended and trainer.lightning_module.automatic_optimization:
            _step_plateau_schedulers(trainer, self._loaded["epoch"], self._loaded["metrics"])

    def _saved_start(self, trainer: L.Trainer) -> Any:
        return self._loaded["ranks"][trainer.global_rank]["start"] if self._loaded is not None else None

    def _restore(self, trainer: L.Trainer) -> None:
        assert self._loaded is not None
        now = self._loaded["ranks"][trainer.global_rank]["now"]
        if now is not None:  # else nothing was drawn yet from the state in which the epoch began
            set_random_state(now, generators_of(trainer))
        self._before_batch, self._loaded = now, None


def session_of_rank(
    states: Sequence[Mapping[str, Any] | None], trainer: L.Trainer
) -> Mapping[str, Any] | None:
    """Return what a checkpoint holds of this process's session.

    All but the statistics is the same on all ranks; with another number of processes the statistics are left out.
    """
    if len(states) == trainer.world_size:
        return states[trainer.global_rank]
    return {**states[0], "statistics": None} if states and states[0] is not None else None


def is_within_batch(trainer: L.Trainer) -> bool:
    """Return whether a training batch has begun, and a run that is resumed now will begin with it."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
    return bool(batches["ready"] > batches["processed"])


def is_batch_complete(trainer: L.Trainer) -> bool:
    """Return whether the last training batch has ended but for the hooks of its end."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.state_dict()["current"]
    return bool(batches["processed"] > batches["completed"])


def _complete_batch_(loops: dict[str, Any]) -> bool:
    """Mark the last batch as completed in a checkpoint from the end of a batch, and its validation as not begun.

    Lightning then validates if it is due, and continues; otherwise it would skip the validation and, after the last
    batch, the end of the epoch.

    Returns:
        Whether the checkpoint comes from the end of a batch; others stay as they are.
    """
    batches = loops["epoch_loop.batch_progress"]
    if batches["total"]["completed"] != batches["total"]["processed"] - 1:
        return False
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation["current"] = dict.fromkeys(validation["current"], 0)
    total = validation["total"]
    total["processed"] = total["completed"]
    total["ready"] = total["started"] = total["completed"] + 1
    return True


def _skip_batches(trainer: L.Trainer, start: Any, batch_ended: bool) -> None:
    """Draw the batches before the checkpoint again and drop them.

    Args:
        trainer: its fetcher is moved to the next batch to train on.
        start: random state to draw them from; None: the fetcher was started from it already.
        batch_ended: whether the checkpoint comes from the end of a batch.
    """
    fetcher, loader = internals.prefetcher(trainer), internals.training_loader(trainer)
    if loader is None or fetcher is None:
        return
    if batch_ended and not internals.is_validation_due(trainer) and not internals.is_accumulating(trainer):
        internals.count_step_of_batch(trainer)  # otherwise Lightning counts it before the validation
    if internals.all_batches_started(trainer):
        fetcher.done = True
    elif not any(map(internals.is_stateful, loader.flattened)):
        if start is not None:
            set_random_state(start, generators_of(trainer))
            for part in loader.flattened:
                internals.set_sampler_epoch(part, trainer.current_epoch)
            iter(fetcher)  # starts the loaders again, and draws the order of samples from `start`
        completed = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        for _ in range(completed):
            next(fetcher)
        fetcher.fetched -= completed  # Lightning adds the number again


def _step_plateau_schedulers(trainer: L.Trainer, epoch: int, metrics: Mapping[str, torch.Tensor]) -> None:
    for config in trainer.lr_scheduler_configs:
        due = config.interval == "epoch" and (epoch + 1) % config.frequency == 0
        value = metrics.get(config.monitor or "")
        if config.reduce_on_plateau and due and value is not None:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, value)


def _is_at_its_end(progress: Mapping[str, int]) -> bool:
    """Return whether all batches of an epoch were trained, and only what follows the hooks of its end is missing."""
    return progress["ready"] == progress["processed"] == progress["completed"] + 1
