"""What a pruning callback keeps in checkpoints, and how a checkpoint finds a network of its shape (level 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_prune.pruning.cut_summary import CutSummary
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import CHECKPOINT_KEY
from lightning_prune.trainer.checkpoint_hooks import add_to_checkpoints, set_load_hook, shrink_with_averages_
from lightning_prune.trainer.checks import check_alone, check_strategy
from lightning_prune.trainer.resume import Resumption
from lightning_prune.trainer.retraining import Retraining
from lightning_prune.trainer.training_state import callbacks_of
from lightning_prune.trainer.weight_averaging import AveragedCopy
from lightning_prune.utils.distributed import gathered

__all__ = ["PruningCallbackBase"]


class PruningCallbackBase(L.Callback):
    """Knows what was removed so far, and has checkpoints know it; a subclass says when to prune.

    Args:
        timing: when cuts come.
        retraining: what follows them.
        submodule: qualified name of the part that is pruned, if it is not the whole module.

    Attributes:
        record: what has been removed so far, relative to the dense network; None before the first cut.
        history: the facts of every cut.
    """

    def __init__(self, timing: Timing, retraining: Retraining, submodule: str | None) -> None:
        self.timing, self.retraining, self.submodule = timing, retraining, submodule
        self.record: PruningRecord | None = None
        self.history: list[CutSummary] = []
        self._dense: DenseSizes | None = None
        self._ended = -1  # the last epoch whose end was dealt with, or step
        self._scored = True  # a validation began after the last cut
        self._run: PruningSession | None = None
        self._resumption = Resumption()
        self._taken_up: Mapping[str, Any] | None = None

    def scored_as_it_is(self, trainer: L.Trainer) -> bool:
        """Whether no cut was made since the validation, or the epoch, whose scores there are now."""
        return self._scored or not self.history or self.history[-1].epoch < trainer.current_epoch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Arrange that a pruned checkpoint finds a network of its shape."""
        check_strategy(trainer)
        check_alone([held for held in callbacks_of(trainer) if isinstance(held, PruningCallbackBase)])
        self._resumption, self._taken_up = Resumption(), None
        set_load_hook(pl_module, lambda checkpoint: self._shrink(trainer, pl_module, checkpoint))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hooks behind."""
        set_load_hook(pl_module, None)
        if self._run:
            self._run.forget()
        self._run = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave no hooks behind."""
        self.teardown(trainer, pl_module, "exception")

    def state_dict(self) -> dict[str, Any]:
        """What has been done so far, as plain numbers."""
        return {
            "record": self.record.to_dict() if self.record else None,
            "dense": self._dense.to_dict() if self._dense else None,
            "history": [asdict(cut) for cut in self.history],
            "retraining": self.retraining.state(),
            "ended": {"unit": self.timing.unit, "last": self._ended},
            "scored": self._scored,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. The network itself was cut before its weights were loaded."""
        record, dense = state_dict["record"], state_dict["dense"]
        self.record = PruningRecord.from_dict(record) if record else None
        if dense:  # Lightning's tuners put back the state from before the first trace
            self._dense = DenseSizes.from_dict(dense)
        self.history = [CutSummary(**cut) for cut in state_dict["history"]]
        self.retraining.load(state_dict["retraining"])
        ended, self._scored = state_dict["ended"], state_dict["scored"]
        self._ended = ended["last"] if ended["unit"] == self.timing.unit else -1

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the record where whoever loads the weights finds it, and what it takes to go on."""
        saved = self._saved()
        saved["runs"] = gathered(self._run.state() if self._run else None)
        saved["resume"] = self._resumption.save(trainer)
        saved["final"] = self.retraining.final and not self.retraining.pending
        checkpoint[CHECKPOINT_KEY] = saved

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Training goes on where the checkpoint was written; to test, weights and record are enough."""
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        if trainer.state.fn == TrainerFn.FITTING and "resume" in saved:
            self._resumption.load(trainer, saved["resume"], checkpoint)
            runs = saved["runs"]
            self._taken_up = runs[trainer.global_rank] if len(runs) == trainer.world_size else None
            if saved["final"]:
                self.retraining.use_final_phase(pl_module)

    def _saved(self) -> dict[str, Any]:
        return {"record": self.record.to_dict() if self.record else None, "submodule": self.submodule}

    def _shrink(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Cut the network to a checkpoint's record before the weights arrive, and its averages."""
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        if saved.get("record") is not None:
            self.record = shrink_with_averages_(trainer, pl_module, saved, checkpoint["state_dict"])
            add_to_checkpoints(pl_module, {CHECKPOINT_KEY: self._saved()})

    def _take(self, trainer: L.Trainer, record: PruningRecord, copies: Sequence[AveragedCopy]) -> None:
        """After a cut of the network: cut its averages likewise, and have all checkpoints know of it."""
        self.record = record if self.record is None else self.record.then(record)
        self._scored = False
        add_to_checkpoints(trainer.lightning_module, {CHECKPOINT_KEY: self._saved()})
        for copy in copies:
            copy.record_for(record, self.submodule).apply_(copy.module)
