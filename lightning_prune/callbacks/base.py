"""Base callback: keeps the pruning record in checkpoints and restores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.cut_summary import History
from lightning_prune.pruning.pruned_training import PrunedTraining
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.serialization.carried_record import carried_record
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saving import CHECKPOINT_KEY, find_submodule, names_of_copies
from lightning_prune.surgery.optimizer_state import CutParameter
from lightning_prune.trainer.checkpoint_hooks import (
    add_to_checkpoints,
    fits_module,
    resize_with_copies_,
    saved_entry,
    set_load_hook,
)
from lightning_prune.trainer.checks import check_alone, check_resume, check_strategy, explain_resume
from lightning_prune.trainer.copy_watch import CopyWatch
from lightning_prune.trainer.followers import (
    Followers,
    check_followers,
    copies_by_name,
    copies_to_cut,
    cut_copies_,
    has_hook,
    prunable_tensors,
    resolve_followers,
    unnamed_copies,
)
from lightning_prune.trainer.lightning_internals import callbacks_of
from lightning_prune.trainer.resume import Resumption, is_within_batch, session_of_rank
from lightning_prune.trainer.retraining import Retraining
from lightning_prune.trainer.training_state import target_of
from lightning_prune.trainer.weight_averaging import AveragedCopy
from lightning_prune.utils.distributed import gather_all
from lightning_prune.utils.modules import is_within

__all__ = ["PruningCallbackBase"]


class PruningCallbackBase(L.Callback):
    """Keep the record of all cuts in checkpoints, and cut a dense network to a checkpoint's record before loading.

    Args:
        timing: when cuts are due.
        retraining: adapts the trainer after a cut.
        submodule: qualified name of the part that is pruned, if it is not the whole module.
        followers: names of copies in the module that are cut along, or copy -> original; None: those of the
            checkpoint that is resumed, if any.

    Attributes:
        record: what was removed so far, relative to the dense network; None before the first cut.
        history: a summary of every cut.
        copies: modules that are cut along -> the module of which each is a copy, by names in the LightningModule.
    """

    def __init__(
        self, timing: Timing, retraining: Retraining, submodule: str | None, followers: Followers = None
    ) -> None:
        self.timing, self.retraining, self.submodule = timing, retraining, submodule
        self.followers = check_followers(followers)
        self.copies: dict[str, str] = {}
        self._state = PrunedTraining()
        self._validated = True  # whether a validation began after the last cut
        self._resumption = Resumption()
        self._watch: CopyWatch | None = None
        self._session_state: Mapping[str, Any] | None = None  # from a checkpoint, until training starts
        self._ended_session: Mapping[str, Any] | None = None  # of the last training, for checkpoints after it

    @property
    def record(self) -> PruningRecord | None:
        """The record of all filters removed so far, compared with the dense network; None before the first cut."""
        return self._state.record

    @record.setter
    def record(self, record: PruningRecord | None) -> None:
        self._state.record = record

    @property
    def history(self) -> History:
        """A summary of every cut."""
        return self._state.history

    @history.setter
    def history(self, history: History) -> None:
        self._state.history = history

    @property
    def _session(self) -> PruningSession | None:
        return self._state.session

    @property
    def _dense(self) -> DenseSizes | None:
        return self._state.dense

    def has_current_score(self, trainer: L.Trainer) -> bool:
        """Return whether the latest metrics are those of the network after its last cut."""
        last = self.history[-1].epoch if self.history else None
        return self._validated or last is None or last < trainer.current_epoch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have checkpoints of a smaller network cut the module before their weights are loaded.

        Raises:
            ValueError: the strategy is not supported, or there is another pruning callback.
        """
        check_strategy(trainer)
        check_alone(
            [callback for callback in callbacks_of(trainer) if isinstance(callback, PruningCallbackBase)]
        )
        self._session_state, self._watch = None, None
        if stage == "fit":
            self._resumption, self._ended_session = Resumption(), None
        self.copies = self.copies if self.record else {}
        self._take_over_record(pl_module)
        set_load_hook(pl_module, lambda checkpoint: self._resize(trainer, pl_module, checkpoint))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove all hooks; keep what was observed, for checkpoints that are written from now on."""
        if stage in ("validate", "test", "predict"):
            # The state may be that of a checkpoint before the end of training, where the trainer still is.
            ended = trainer.global_step if self.timing.by_steps else trainer.current_epoch - 1
            self._state.last_handled = max(self._state.last_handled, ended)
        set_load_hook(pl_module, None)
        self.retraining.warmup.detach()
        if self._session:
            if is_within_batch(trainer):
                self._session.drop_batch()
            self._ended_session = self._session.state()
            self._session.stop_observing()
        self._state.session = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove all hooks; say what may be wrong if a copy of the network was not cut along."""
        explain_resume(trainer, exception)
        if self._watch is not None and self.history and isinstance(exception, Exception):
            self._watch.explain(exception)
        self._resumption.on_exception(trainer)
        self.teardown(trainer, pl_module, "exception")

    def state_dict(self) -> dict[str, Any]:
        """Return record, history and the state of the retraining as plain values."""
        return {
            **self._state.state(self.timing),
            "retraining": self.retraining.state(),
            "scored": self._validated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned. The network was already cut, before its weights were loaded."""
        self._state.load(state_dict, self.timing)
        self.retraining.load(state_dict["retraining"])
        self._validated = state_dict["scored"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record, and all that resuming needs, at the top level of the checkpoint."""
        checkpoint[CHECKPOINT_KEY] = {
            **self._record_entry(),
            "runs": gather_all(self._session.state() if self._session else self._ended_session),
            "resume": self._resumption.save(trainer),
            "final": self.retraining.final and not self.retraining.pending,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Prepare to resume training; testing needs weights and record only."""
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        if "resume" not in saved:
            return
        state = session_of_rank(saved["runs"], trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self._ended_session = state
            return
        check_resume(trainer)
        self._resumption.load(trainer, saved["resume"], checkpoint)
        self._session_state = state
        if saved["final"]:
            self.retraining.use_final_phase(pl_module)

    def worker_results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return, in a process that a launcher started for training, what the main process has to know."""
        return {"entry": self._record_entry(), "state": self.state_dict(), "session": self._ended_session}

    def on_worker_results(
        self, trainer: L.Trainer, results: Mapping[str, Any], weights: Mapping[str, Any]
    ) -> None:
        """Follow the training in other processes: resize the module of this one, and take over the state.

        Args:
            trainer: of the main process.
            results: what :meth:`worker_results` returned.
            weights: of the trained network, which are loaded next.
        """
        checkpoint = {CHECKPOINT_KEY: results["entry"], "state_dict": weights}
        self._resize(trainer, trainer.lightning_module, checkpoint)
        self.load_state_dict(results["state"])
        self._ended_session = results["session"]

    def _record_entry(self) -> dict[str, Any]:
        """Return the part of the checkpoint's entry that loading the weights needs."""
        record = self.record.to_dict() if self.record else None
        return {"record": record, "submodule": self.submodule, "copies": dict(self.copies)}

    def _resize(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        """Give the network and its copies the sizes of a checkpoint, before the weights are loaded."""
        saved, weights = checkpoint.get(CHECKPOINT_KEY), checkpoint["state_dict"]
        if saved is None:  # a training without pruning wrote it
            saved = {"record": None, "submodule": self.submodule}
            if self.record is None or fits_module(pl_module, weights):
                return
        self._check_submodule(pl_module, saved)
        is_resized = resize_with_copies_(trainer, pl_module, saved, weights, self.copies)
        record = saved.get("record")
        if record is None and self.record is None:
            return
        self.record = None if record is None else PruningRecord.from_dict(record)
        self.copies = names_of_copies(saved)
        add_to_checkpoints(pl_module, {CHECKPOINT_KEY: self._record_entry()})
        if is_resized:
            self._forget(trainer, saved)

    def _check_submodule(self, pl_module: L.LightningModule, saved: Mapping[str, Any]) -> None:
        """Raise RecordError if a checkpoint's record names other tensors than this callback's record would."""
        submodule = saved.get("submodule")
        find_submodule(pl_module, submodule or "")
        if saved.get("record") is not None and (submodule or "") != (self.submodule or ""):
            raise RecordError(
                f"the checkpoint was written with submodule={submodule!r}, the callback has {self.submodule!r}: set "
                "it as in that run"
            )

    def _forget(self, trainer: L.Trainer, saved: Mapping[str, Any]) -> None:
        """Forget what belongs to the size that the network had before; a checkpoint with callbacks restores it.

        Args:
            trainer: holds the optimizers of the training that has ended.
            saved: this package's entry of the checkpoint whose size the network has now.
        """
        self.history, self._ended_session = History(), None
        if trainer.state.fn != TrainerFn.FITTING:
            for optimizer in trainer.optimizers:  # of the training that has ended, for the next checkpoint
                optimizer.state.clear()

    def _take_over_record(self, pl_module: L.LightningModule) -> None:
        """Continue the record that the network carries, if it was pruned before this callback was given to a trainer.

        Raises:
            ValueError: other parts of the module were pruned, and checkpoints of this callback would not say so.
        """
        modules, saved = dict(pl_module.named_modules()), saved_entry(pl_module, CHECKPOINT_KEY)
        if self.record is not None or (self.submodule or "") not in modules:
            return
        before = saved.get("submodule") or ""
        copies = {name: original for name, original in names_of_copies(saved).items() if name in modules}
        left_out = [modules[name] for name in copies]
        is_elsewhere = (
            saved.get("record") and before in modules and not is_within(before, self.submodule or "")
        )
        if is_elsewhere and carried_record(modules[before], left_out):
            raise ValueError(
                f"{before or 'the whole module'!r} was pruned before, and checkpoints of a callback that prunes "
                f"{self.submodule!r} would not say so: set submodule={before or None!r}, or build the module anew"
            )
        record = carried_record(modules[self.submodule or ""], left_out)
        if record or saved:
            self.record, self.copies = record or None, copies if record else {}
            add_to_checkpoints(pl_module, {CHECKPOINT_KEY: self._record_entry()})

    def check_copies(self) -> None:
        """Check, before the first cut, that no module which resembles the network follows it unsaid."""
        if self._watch is not None and self.record is None:
            self._watch.check()

    def _find_copies(self, trainer: L.Trainer, pl_module: L.LightningModule, graph: ChannelGraph) -> None:
        """Find the copies that are cut along, and watch what resembles the network if nothing was said about it.

        Raises:
            ValueError: a copy cannot be matched; now, and not at the first cut.
        """
        prunable = prunable_tensors(graph, self.submodule)
        followers = self.followers if self.followers is not None else dict(self.copies)
        originals = resolve_followers(followers, pl_module, prunable)
        before, copies = self.copies, copies_to_cut(trainer, pl_module, originals)
        self.copies = copies_by_name(pl_module, copies)
        for name in before.keys() - self.copies.keys() if self.record else ():
            if carried_record(target_of(pl_module, name)):
                raise ValueError(f"{name!r} was cut along before: name it in followers again")
        if self.followers is None and self.record is None and not has_hook(pl_module, self.submodule):
            self._watch = CopyWatch(unnamed_copies(pl_module, prunable), pl_module, trainer.optimizers)
            self._watch.warn_at_start()

    def register_cut(
        self, trainer: L.Trainer, record: PruningRecord, copies: Sequence[AveragedCopy]
    ) -> dict[str, CutParameter]:
        """Add the record of a cut to all checkpoints, and cut the network's copies likewise.

        Returns:
            The parameters of copies that were cut, for optimizers that hold them.
        """
        self._validated = False
        pl_module = trainer.lightning_module
        self.copies = copies_by_name(pl_module, copies)
        add_to_checkpoints(pl_module, {CHECKPOINT_KEY: self._record_entry()})
        return cut_copies_(copies, pl_module, record, self.submodule)
