"""Going on from a checkpoint as if nothing had happened: what Lightning itself does not restore (level 4).

Lightning 2.6 restores weights, optimizers, schedulers and its counters. It does not restore random states; within an
epoch it starts the data from the beginning again; a checkpoint from the end of a training batch makes it leave
out the validation and, after the last batch, the end of the epoch that should follow; and a plateau scheduler
misses the step of the epoch that ended with the checkpoint. :class:`Resumption` makes up for all of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_leaves

from lightning_prune.utils.distributed import gathered
from lightning_prune.utils.seeding import random_state, set_random_state

__all__ = ["Resumption"]


def generators_of(trainer: L.Trainer) -> list[torch.Generator]:
    """The generators that the user gave to data loaders and samplers, each once."""
    loaders = tree_leaves([trainer.train_dataloader, trainer.val_dataloaders])
    held = [getattr(owner, "generator", None) for x in loaders for owner in (x, getattr(x, "sampler", None))]
    return list({id(found): found for found in held if isinstance(found, torch.Generator)}.values())


class Resumption:
    """Belongs to a callback, which calls the methods from its own hooks of the same names.

    A checkpoint may come from any hook of Lightning's ``ModelCheckpoint``: the end of a training batch, of a
    validation, of an epoch. What is restored then, on every rank its own: random states, the place within the
    epoch's data (the batches seen are drawn again, and dropped), metrics that others monitor, a plateau
    scheduler's step.

    Not restored: random states inside ``persistent_workers``, the sums of metrics logged with
    ``on_epoch=True`` in the part of the epoch before the checkpoint, gradients of an accumulation under way.
    Loaders with a ``state_dict`` of their own are left to Lightning.
    """

    def __init__(self) -> None:
        self._epoch_start: dict[str, Any] | None = None  # from where this epoch's batches were drawn
        self._loaded: Mapping[str, Any] | None = None
        self._batch_ended = self._epoch_ended = False

    def save(self, trainer: L.Trainer) -> dict[str, Any]:
        """What a checkpoint needs to hold, as tensors and plain values. All processes must call it."""
        now = random_state(generators_of(trainer))
        metrics = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
        ranks = gathered({"start": self._epoch_start, "now": now})
        return {"epoch": trainer.current_epoch, "ranks": ranks, "metrics": metrics}

    def load(self, trainer: L.Trainer, saved: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take up what :meth:`save` gave, before Lightning restores its loops from ``checkpoint``."""
        if len(saved["ranks"]) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was written by {len(saved['ranks'])} processes, now there are {trainer.world_size}: "
                "training goes on, but not on the same random numbers"
            )
            return
        self._loaded = saved
        loops = checkpoint["loops"]["fit_loop"]
        self._batch_ended, self._epoch_ended = (
            _end_batch_(loops),
            _is_at_its_end(loops["epoch_progress"]["total"]),
        )

    def on_fit_start(self, trainer: L.Trainer) -> None:
        """The batches of the first epoch are drawn from here."""
        if self._loaded is not None and self._loaded["epoch"] == 0 and self._start(trainer):
            set_random_state(self._start(trainer))
        elif trainer.current_epoch == 0:
            self._epoch_start = random_state()

    def on_train_start(self, trainer: L.Trainer) -> None:
        """Go back to where the checkpoint was written, if that was within an epoch."""
        if self._loaded is None:
            return
        trainer.callback_metrics.update(self._loaded["metrics"])
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
            self._epoch_start = self._start(trainer)
            start = self._epoch_start if self._loaded["epoch"] else None  # on_fit_start saw to epoch 0
            _fast_forward(trainer, start, self._batch_ended)
            self._restore(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer) -> None:
        """Go back to where the checkpoint was written, if that was between two epochs."""
        if self._loaded is not None:
            self._step_schedulers(trainer)
            self._restore(trainer)
            # Have the epoch's batches drawn after this hook, as in a run that was not interrupted.
            trainer.fit_loop._resuming_from_checkpoint = False
        if trainer.current_epoch > 0:
            self._epoch_start = random_state(generators_of(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer) -> None:
        """Lightning leaves plateau schedulers out after a restart, for want of the metrics, which are back."""
        trainer.fit_loop._restarting = False

    def on_fit_end(self, trainer: L.Trainer) -> None:
        """Where nothing was left to train, none of the other hooks was called."""
        if self._loaded is not None:
            self._step_schedulers(trainer)
            self._restore(trainer)

    @property
    def between_epochs(self) -> bool:
        """Whether the next ``on_train_epoch_start`` follows the checkpoint of a finished epoch."""
        return self._loaded is not None

    def _step_schedulers(self, trainer: L.Trainer) -> None:
        """Lightning steps plateau schedulers after the hook that checkpoints of an epoch's end come from."""
        assert self._loaded is not None
        if self._epoch_ended and trainer.lightning_module.automatic_optimization:
            _step_plateau_schedulers(trainer, self._loaded["epoch"], self._loaded["metrics"])

    def _start(self, trainer: L.Trainer) -> Any:
        return self._loaded["ranks"][trainer.global_rank]["start"] if self._loaded is not None else None

    def _restore(self, trainer: L.Trainer) -> None:
        assert self._loaded is not None
        set_random_state(self._loaded["ranks"][trainer.global_rank]["now"], generators_of(trainer))
        self._loaded = None


def _end_batch_(loops: dict[str, Any]) -> bool:
    """Let a checkpoint from the end of a training batch say that the batch is done and a validation is not.

    Lightning then validates if it is due, and goes on; otherwise it would skip both validation and, after the
    last batch, the end of the epoch.
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


def _fast_forward(trainer: L.Trainer, start: Any, batch_ended: bool) -> None:
    """Draw the batches that were seen before the checkpoint once more, from ``start`` on, and drop them."""
    loop, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.batch_progress
    fetcher, combined = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
    if combined is None or not isinstance(fetcher, _PrefetchDataFetcher):
        return
    if batch_ended and not loop._should_check_val_fx(fetcher) and not loop._should_accumulate():
        loop._batches_that_stepped += 1  # else Lightning adds it with the validation
    if loop._num_ready_batches_reached():
        fetcher.done = True
    elif not any(isinstance(loader, _Stateful) for loader in combined.flattened):
        if start is not None:
            set_random_state(start, generators_of(trainer))
            for loader in combined.flattened:
                _set_sampler_epoch(loader, trainer.current_epoch)
            iter(fetcher)
        for _ in range(progress.current.completed):
            next(fetcher)
        fetcher.fetched -= progress.current.completed  # Lightning adds it again


def _step_plateau_schedulers(trainer: L.Trainer, epoch: int, metrics: Mapping[str, torch.Tensor]) -> None:
    for config in trainer.lr_scheduler_configs:
        due = config.interval == "epoch" and (epoch + 1) % config.frequency == 0
        value = metrics.get(config.monitor or "")
        if config.reduce_on_plateau and due and value is not None:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, value)


def _is_at_its_end(progress: Mapping[str, int]) -> bool:
    """Whether an epoch, as its hooks see it, ended, but for what comes after the hooks."""
    return progress["ready"] == progress["processed"] == progress["completed"] + 1
