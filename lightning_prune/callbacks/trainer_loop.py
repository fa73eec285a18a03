"""Lightning's trainer as the training loop around a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.base import PruningCallbackBase
from lightning_prune.callbacks.block_scores import block_scores_in_training
from lightning_prune.callbacks.compensation import TrainerCompensation
from lightning_prune.callbacks.methods.base import PruningMethod
from lightning_prune.compensation.report import CompensationReport
from lightning_prune.pruning.cut_repair import CutRepair
from lightning_prune.pruning.cut_summary import CutSummary
from lightning_prune.pruning.pruned_training import TrainingLoop
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.step import BlockScores
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.optimizer_state import CutParameter
from lightning_prune.surgery.sharding import whole_network
from lightning_prune.trainer.followers import call_after_prune, copies_to_cut
from lightning_prune.trainer.lightning_internals import callbacks_of
from lightning_prune.trainer.training_state import print_line
from lightning_prune.trainer.weight_averaging import AveragedCopy, submodules_in_copies

__all__ = ["TrainerLoop"]


@dataclass
class TrainerLoop(TrainingLoop):
    """Lightning's trainer as the training loop around a cut: gives it optimizers, copies of the network, and data.

    Attributes:
        callback: keeps the record, and adapts the trainer.
        method: removes the units.
        compensation: repairs the cut.
        trainer: runs the training.
        session: the network.
        now: the moment of the cut.
        epoch: at whose end, or within which, the cut is made.
        verbose: print a line.
        copies: averages and followers, which are cut along; found when the cut begins.
    """

    callback: PruningCallbackBase
    method: PruningMethod
    compensation: TrainerCompensation
    trainer: L.Trainer
    session: PruningSession
    now: int
    epoch: int
    verbose: bool
    copies: Sequence[AveragedCopy] = ()

    def whole_network(self, session: PruningSession) -> AbstractContextManager[None]:
        """Gather a module that ``fully_shard`` distributes, and the state of its optimizers."""
        return whole_network(self.trainer.lightning_module, self.trainer.optimizers)

    def begin_cut(self) -> tuple[Sequence[nn.Module], Sequence[Optimizer]]:
        """Find copies and optimizers, and call ``on_before_cut`` of all callbacks."""
        callback, trainer = self.callback, self.trainer
        callback.check_copies()
        self.copies = copies_to_cut(trainer, trainer.lightning_module, callback.copies)
        optimizers = callback.retraining.optimizers_to_cut(trainer)
        call_hook(trainer, "on_before_cut")
        return submodules_in_copies(self.copies, callback.submodule), optimizers

    def repair_of_cut(
        self, session: PruningSession, copies: Sequence[nn.Module], number: int
    ) -> CutRepair | None:
        """Return a repair with images of the training data."""
        return self.compensation.of_cut(self.trainer, session, copies, number)

    def block_scores(self, number: int) -> BlockScores | None:
        """Return a function that scores residual blocks on images of the training data."""
        return block_scores_in_training(self.trainer, self.method.policy.depth, number)

    def remove_units_(
        self, session: PruningSession, copies: Sequence[nn.Module], optimizers: Sequence[Optimizer]
    ) -> PruningRecord:
        """Have the method cut the network."""
        return self.method.cut_(self.trainer, session, self.now, copies, optimizers)

    def cut_copies_(self, record: PruningRecord) -> Mapping[str, CutParameter]:
        """Cut averages and followers, and have checkpoints know the cut."""
        cut_parameters = self.callback.register_cut(self.trainer, record, self.copies)
        self.callback.retraining.begin_(self.trainer)
        return cut_parameters

    def after_units_(self, session: PruningSession) -> None:
        """Have the method adapt network and copies."""
        self.method.after_cut_(self.trainer, session)

    def repair_(self, repair: CutRepair) -> CompensationReport:
        """Repair network and copies; warn once where that is impossible."""
        return self.compensation.repair_(repair)

    def adapt_(self, record: PruningRecord, copies: Sequence[nn.Module], keeps_norms: bool) -> None:
        """Adapt optimizers and wrapper to the smaller network, and the norms of it and its copies."""
        callback, trainer = self.callback, self.trainer
        call_after_prune(trainer.lightning_module, callback.submodule, record)
        if self.method.is_finished(self.session):
            callback.retraining.start_final_phase(trainer, self.epoch + 1)
        networks = [self.session.target, *copies]
        callback.retraining.adapt_trainer_(trainer, networks, callback.timing.by_steps, keeps_norms)

    def end_cut(self, summary: CutSummary) -> None:
        """Call ``on_after_cut`` of all callbacks, and print a line."""
        call_hook(self.trainer, "on_after_cut")
        if self.verbose:
            print_line(self.trainer, self.method.report(str(summary), self.session))


def call_hook(trainer: L.Trainer, hook: str) -> None:
    """Call ``hook(trainer, pl_module)`` of all callbacks that define it."""
    for callback in callbacks_of(trainer):
        if (function := getattr(callback, hook, None)) is not None:
            function(trainer, trainer.lightning_module)
