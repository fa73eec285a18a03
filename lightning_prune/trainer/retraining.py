"""Adapt optimizers, wrapper and norms after a cut, and begin the final phase when pruning has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_prune.surgery.optimizer_buffers import base_optimizers, buffers_of
from lightning_prune.trainer.batches import recalibrate_norms_
from lightning_prune.trainer.checks import has_persistent_workers
from lightning_prune.trainer.lightning_internals import configured_optimizers
from lightning_prune.trainer.optimizers import rebuild_optimizers_, rebuild_wrapper_
from lightning_prune.trainer.warmup import Warmup
from lightning_prune.utils.arguments import check_choice

__all__ = ["FinalPhase", "OptimizerMode", "Retraining"]

OptimizerMode = Literal["reset", "carry"]
DEFAULT_BATCHES = 16  # to estimate batch norms on


@dataclass(frozen=True)
class FinalPhase:
    """Optimizer, scheduler and length of the training after pruning has ended.

    A final phase is a function of the module that returns what ``configure_optimizers`` returns; any such function
    can be used instead.

    Args:
        optimizer: ``parameters -> Optimizer``; None: the module's own.
        scheduler: ``optimizer -> scheduler``; None: the learning rate is constant.
        lr: learning rate of all parameter groups; None: that of the optimizer.
        epochs: train for this many whole epochs more, whatever ``max_epochs`` is; None: until ``max_epochs``.
        interval: whether the scheduler steps with every ``"epoch"`` or ``"step"``.
        monitor: name of the metric that a plateau scheduler reads.

    Raises:
        ValueError: an argument is out of range; when the phase begins: the module has several optimizers.

    Example:
        >>> import torch
        >>> cosine = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        >>> FinalPhase(scheduler=cosine, lr=1e-3, epochs=20).epochs
        20
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    scheduler: Callable[[Optimizer], Any] | None = None
    lr: float | None = None
    epochs: int | None = None
    interval: str = "epoch"
    monitor: str | None = None

    def __post_init__(self) -> None:
        check_choice("interval", self.interval, ("epoch", "step"))
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"the final phase needs at least 1 epoch, got epochs={self.epochs}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"the learning rate of the final phase must be positive, got lr={self.lr}")
        for name in ("optimizer", "scheduler"):
            if not (getattr(self, name) is None or callable(getattr(self, name))):
                raise ValueError(f"{name} must be a function that builds one, got {getattr(self, name)!r}")

    def __call__(self, module: L.LightningModule) -> dict[str, Any]:
        """Return optimizer and scheduler in the form of ``configure_optimizers``."""
        optimizer = self._optimizer(module)
        for group in optimizer.param_groups:
            # The module's own scheduler has changed "lr" already, and keeps the original value in "initial_lr".
            initial = group.pop("initial_lr", group["lr"])
            group["lr"] = initial if self.lr is None else self.lr
        if self.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        monitor = {"monitor": self.monitor} if self.monitor else {}
        return {"optimizer": optimizer, "lr_scheduler": scheduler | monitor}

    def _optimizer(self, module: L.LightningModule) -> Optimizer:
        if self.optimizer:
            return self.optimizer([p for p in module.parameters() if p.requires_grad])
        optimizers = configured_optimizers(module.configure_optimizers())
        if len(optimizers) != 1:
            raise ValueError(
                f"FinalPhase supports one optimizer, the module configures {len(optimizers)}; set final_phase to a "
                "function of the module that returns what configure_optimizers would"
            )
        return optimizers[0]


class Retraining:
    """Adapts optimizers, wrapper and norms to the network after each cut; owned by a pruning callback.

    Args:
        mode: ``"reset"`` builds optimizers and schedulers anew after a cut, ``"carry"`` cuts the optimizers' state.
        final_phase: function of the module that configures the training after pruning has ended; None: no change.
        batches: number of batches to estimate batch norms on after a cut; None: 0 if the cut was repaired, else 16,
            or 0 where a second pass over the training data would restart the persistent workers of the epoch.
        warmup_steps: optimizer steps after each cut with a lower learning rate, see :class:`Warmup`.

    Attributes:
        pending: optimizers are to be built anew before the next batch.
        keeps_schedulers: the optimizers that are due get the learning rates and schedulers of those they replace.
        final: the final phase has begun, or begins with the next batch.
        end: the number of epochs after which the final phase ends; None: that of the trainer.

    Raises:
        ValueError: ``mode`` is something else, or ``final_phase`` cannot be called.

    Example:
        >>> Retraining("carry", warmup_steps=20).mode
        'carry'
    """

    def __init__(
        self,
        mode: OptimizerMode,
        final_phase: Callable[[L.LightningModule], Any] | None = None,
        batches: int | None = None,
        warmup_steps: int = 0,
    ) -> None:
        check_choice("optimizer", mode, get_args(OptimizerMode))
        if final_phase is not None and not callable(final_phase):
            raise ValueError(
                f"final_phase must be a FinalPhase or a function of the module, got {final_phase!r}"
            )
        self.mode, self.final_phase, self.batches = mode, final_phase, batches
        self.warmup = Warmup(warmup_steps)
        self.pending = self.final = self.keeps_schedulers = False
        self.end: int | None = None
        self._must_rebuild = (
            False  # whether the present cut leaves optimizers behind that must not step again
        )

    def optimizers_to_cut(self, trainer: L.Trainer) -> Sequence[Optimizer]:
        """Return the optimizers whose state is cut along with the network.

        If one of them keeps tensors outside of its state that cannot be cut, all are built anew after the cut, with a
        warning, and keep their learning rates and schedulers.
        """
        self._must_rebuild = False
        if self.mode == "carry":
            for optimizer in trainer.optimizers:
                if opaque := buffers_of(optimizer).opaque:
                    self._must_rebuild = True
                    rank_zero_warn(
                        f"{type(optimizer).__name__} keeps tensors outside of optimizer.state that cannot be cut "
                        f"({', '.join(opaque[:3])}): optimizers are built anew after the cut, and lose their state"
                    )
        return trainer.optimizers if self.mode == "carry" and not self._must_rebuild else ()

    def begin_(self, trainer: L.Trainer) -> None:
        """Drop the state of optimizers that was not cut along, at once: a checkpoint may be written from here on."""
        if self.mode == "reset" or self._must_rebuild:
            self.keeps_schedulers = self._must_rebuild
            # New optimizers are built before the next batch: Lightning still steps the schedulers of this epoch.
            for optimizer in trainer.optimizers:
                for each in base_optimizers(optimizer):
                    each.state.clear()
            self.pending = True
        self.warmup.start()

    def adapt_trainer_(
        self, trainer: L.Trainer, networks: Sequence[nn.Module], within_epoch: bool, keeps_norms: bool = False
    ) -> None:
        """Adapt the wrapper after a cut, at the end of an epoch or within it, and the batch norms of ``networks``.

        Args:
            trainer: its wrapper is adapted.
            networks: the network, and its copies.
            within_epoch: the epoch continues after the cut.
            keeps_norms: estimate norms anew only on request: those of a repaired network fit already.
        """
        rebuild_wrapper_(trainer)
        number = self.batches
        if number is None:
            is_skipped = keeps_norms or (within_epoch and has_persistent_workers(trainer))
            number = 0 if is_skipped else DEFAULT_BATCHES
        if number:
            self._recalibrate_norms_(trainer, networks, number)

    def _recalibrate_norms_(self, trainer: L.Trainer, networks: Sequence[nn.Module], number: int) -> None:
        """Estimate norms anew; where that was not requested and is impossible, warn, and leave them as they are."""
        try:
            recalibrate_norms_(trainer, networks, number)
        except Exception as error:  # the network's own code may raise anything
            if self.batches is not None:
                raise
            rank_zero_warn(
                f"batch norms were not estimated anew after the cut, as the network cannot run on training batches "
                f"({type(error).__name__}: {error}); set recalibrate_batches=0, or have batches begin with its input"
            )

    def start_final_phase(self, trainer: L.Trainer, first: int) -> None:
        """Begin the final phase with the next batch, unless it has begun; ``first`` is its first whole epoch."""
        if self.final_phase is not None and not self.final:
            self.final = self.pending = True
            epochs = getattr(self.final_phase, "epochs", None)
            self.end = None if epochs is None else first + epochs
            self.set_end(trainer)

    def set_end(self, trainer: L.Trainer) -> None:
        """Have training end where the final phase does."""
        if self.end is not None:
            trainer.fit_loop.max_epochs = self.end

    def on_train_batch_start(self, trainer: L.Trainer) -> None:
        """Build new optimizers if they are due, and lower the rates of the steps after a cut."""
        self.rebuild_pending_(trainer)
        self.warmup.attach(trainer.optimizers)

    def rebuild_pending_(self, trainer: L.Trainer) -> None:
        """Build new optimizers and schedulers if they are due, before training continues."""
        if not self.pending:
            return
        before = list(trainer.optimizers)
        if self.final:
            self.use_final_phase(trainer.lightning_module)
        keeps_schedulers = self.keeps_schedulers and not self.final
        rebuild_optimizers_(trainer, added=not self.final, keeps_schedulers=keeps_schedulers)
        if self.mode == "carry":
            for old, new in zip(before, trainer.optimizers, strict=True):
                new.state.update(old.state if type(old) is type(new) else {})
        self.pending = self.keeps_schedulers = False

    def use_final_phase(self, pl_module: L.LightningModule) -> None:
        """Replace the module's ``configure_optimizers`` by the final phase, for its next call.

        Raises:
            ValueError: there is no final phase.
        """
        final_phase, attribute = self.final_phase, vars(pl_module).get("configure_optimizers")
        if final_phase is None:
            raise ValueError(
                "the checkpoint was written in the final phase; give the callback the final_phase of that run"
            )

        def configure_optimizers() -> Any:
            del pl_module.configure_optimizers  # the final phase may call the module's own
            if attribute is not None:
                pl_module.configure_optimizers = attribute  # type: ignore[method-assign]
            return final_phase(pl_module)

        pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        warmup = self.warmup.state()
        kept = {"keeps_schedulers": True} if self.keeps_schedulers else {}
        return {"pending": self.pending, "final": self.final, "end": self.end, "warmup": warmup, **kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self.pending, self.final, self.end = state["pending"], state["final"], state["end"]
        self.warmup.load(state.get("warmup"))  # old checkpoints have none
        self.keeps_schedulers = state.get("keeps_schedulers", False)
