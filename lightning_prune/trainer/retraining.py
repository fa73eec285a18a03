"""What follows a cut: optimizers, wrapper and norms; and the final phase, when there are no more cuts (level 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.core.optimizer import _configure_optimizers
from torch import nn
from torch.optim import Optimizer

from lightning_prune.trainer.batches import renew_norms_
from lightning_prune.trainer.optimizers import fresh_optimizers_, rebuild_wrapper_
from lightning_prune.trainer.training_state import is_last_epoch
from lightning_prune.utils.arguments import check_choice

__all__ = ["FinalPhase", "OptimizerMode", "Retraining"]

OptimizerMode = Literal["reset", "carry"]
RECALIBRATION = 16


@dataclass(frozen=True)
class FinalPhase:
    """How training goes on when pruning is over: a learning-rate plan of its own.

    Called with the module, it gives what a ``configure_optimizers`` gives; any function that does may take its place.

    Args:
        optimizer: ``parameters -> Optimizer``; None: the module's own.
        scheduler: ``optimizer -> scheduler``; None: the learning rate stays.
        lr: learning rate of all parameter groups; None: that of the optimizer.
        epochs: train for this many whole epochs from there on, whatever ``max_epochs`` says; None: as it says.
        interval: whether the scheduler steps with every ``"epoch"`` or ``"step"``.
        monitor: what a plateau scheduler watches.

    Raises:
        ValueError: an argument is out of range; when it begins: the module has several optimizers.

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
        """What the module's ``configure_optimizers`` would return."""
        optimizer = self._optimizer(module)
        for group in optimizer.param_groups:
            started = group.pop("initial_lr", group["lr"])  # a scheduler may have been there before
            group["lr"] = started if self.lr is None else self.lr
        if self.scheduler is None:
            return {"optimizer": optimizer}
        plan = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        monitored = {"monitor": self.monitor} if self.monitor else {}
        return {"optimizer": optimizer, "lr_scheduler": plan | monitored}

    def _optimizer(self, module: L.LightningModule) -> Optimizer:
        if self.optimizer:
            return self.optimizer([p for p in module.parameters() if p.requires_grad])
        optimizers, _, _ = _configure_optimizers(module.configure_optimizers())  # type: ignore[arg-type]
        if len(optimizers) != 1:
            raise ValueError(
                f"FinalPhase plans for one optimizer, the module configures {len(optimizers)}; give final_phase a "
                "function (module) -> what configure_optimizers would return"
            )
        return optimizers[0]


class Retraining:
    """Belongs to a pruning callback: has optimizers, wrapper and norms follow the network.

    Args:
        mode: ``"reset"`` builds optimizers and schedulers anew after a cut, ``"carry"`` cut their state along.
        final_phase: what to build when pruning is over, None: nothing.
        batches: on how many to estimate batch norms after a cut; None: on some if no training follows.

    Attributes:
        pending: optimizers are to be built anew before training goes on.
        final: the final phase has begun, or begins with the next batch.
        end: the number of epochs after which the final phase ends; None: that of the trainer.
    """

    def __init__(
        self,
        mode: OptimizerMode,
        final_phase: Callable[[L.LightningModule], Any] | None = None,
        batches: int | None = None,
    ) -> None:
        check_choice("optimizer", mode, get_args(OptimizerMode))
        if final_phase is not None and not callable(final_phase):
            raise ValueError(
                f"final_phase must be a FinalPhase or a function of the module, got {final_phase!r}"
            )
        self.mode, self.final_phase, self.batches = mode, final_phase, batches
        self.pending = self.final = False
        self.end: int | None = None

    def carried(self, trainer: L.Trainer) -> Sequence[Optimizer]:
        """The optimizers whose state is cut along with the network."""
        return trainer.optimizers if self.mode == "carry" else ()

    def follow_(self, trainer: L.Trainer, networks: Sequence[nn.Module], epoch: int) -> None:
        """After a cut in ``epoch``: empty what is stale, wrap anew, renew the norms of ``networks``."""
        if self.mode == "reset":
            # The fresh ones come with the next batch: Lightning still steps the schedulers of this epoch.
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
            self.pending = True
        rebuild_wrapper_(trainer)
        number = self.batches
        if number is None:
            number = RECALIBRATION if is_last_epoch(trainer, epoch) else 0
        if number:
            renew_norms_(trainer, networks, number)

    def over(self, trainer: L.Trainer, first: int) -> None:
        """Pruning is over: the final phase begins with the next batch; ``first`` is its first whole epoch."""
        if self.final_phase is not None and not self.final:
            self.final = self.pending = True
            epochs = getattr(self.final_phase, "epochs", None)
            self.end = None if epochs is None else first + epochs
            self.set_end(trainer)

    def set_end(self, trainer: L.Trainer) -> None:
        """Let training end where the final phase does."""
        if self.end is not None:
            trainer.fit_loop.max_epochs = self.end

    def renew_(self, trainer: L.Trainer) -> None:
        """Before training goes on: fresh optimizers and schedulers, if they are due."""
        if self.pending:
            before = list(trainer.optimizers)
            if self.final:
                self.plan(trainer.lightning_module)
            fresh_optimizers_(trainer, added=not self.final)
            if self.mode == "carry":
                for old, fresh in zip(before, trainer.optimizers, strict=True):
                    fresh.state.update(old.state if type(old) is type(fresh) else {})
            self.pending = False

    def plan(self, pl_module: L.LightningModule) -> None:
        """Have Lightning's next call of ``configure_optimizers`` answered by the final phase."""
        final_phase, held = self.final_phase, vars(pl_module).get("configure_optimizers")
        if final_phase is None:
            raise ValueError(
                "the checkpoint was written in the final phase; give the callback the final_phase of that run"
            )

        def configure_optimizers() -> Any:
            del pl_module.configure_optimizers  # the phase may build on the module's own
            if held is not None:
                pl_module.configure_optimizers = held  # type: ignore[method-assign]
            return final_phase(pl_module)

        pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain values."""
        return {"pending": self.pending, "final": self.final, "end": self.end}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.pending, self.final, self.end = state["pending"], state["final"], state["end"]
