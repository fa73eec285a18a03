"""The callback that carries out any pruning method during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_prune.callbacks.base import PruningCallbackBase
from lightning_prune.callbacks.candidate_training import detached_copy
from lightning_prune.callbacks.compensation import TrainerCompensation
from lightning_prune.callbacks.methods.base import PruningMethod
from lightning_prune.callbacks.trainer_loop import TrainerLoop
from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.pruning.cut_summary import budget_warning, size_metrics
from lightning_prune.pruning.description import description, html_description
from lightning_prune.pruning.pruner_checks import check_observer
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.surgery.sharding import whole_network
from lightning_prune.trainer.batches import first_sample
from lightning_prune.trainer.checks import (
    check_batches,
    check_recalibration,
    check_trained,
)
from lightning_prune.trainer.followers import Followers
from lightning_prune.trainer.lightning_internals import callbacks_of
from lightning_prune.trainer.retraining import Retraining
from lightning_prune.trainer.training_state import is_compiled, target_of
from lightning_prune.trainer.weight_averaging import check_no_average_inside
from lightning_prune.utils.example_inputs import Example, as_example, example_of_shapes

__all__ = ["PruningCallback", "pruning_callbacks"]


class PruningCallback(PruningCallbackBase):
    """Prune a network during training by a :class:`~lightning_prune.callbacks.methods.base.PruningMethod`.

    Users write :class:`~lightning_prune.FilterPruningCallback`, :class:`~lightning_prune.SlimmingCallback` or
    :class:`~lightning_prune.NetAdaptCallback`, which only construct their method. A method of one's own works alike.

    Any callback of the trainer may define ``on_before_cut(trainer, pl_module)``, called before each attempt to cut,
    and ``on_after_cut(trainer, pl_module)``, called after each cut that removed something.

    Args:
        method: decides what is observed, when a cut is due, and which units are removed.
        retraining: adapts optimizers, wrapper and norms after a cut.
        submodule: qualified name of the part to prune, if it is not the whole module.
        verbose: print a line per cut.
        compensate: repair each cut that the method makes through its session; see
            :class:`~lightning_prune.FilterPruningCallback`.
        followers: copies of the network that are cut along; see :class:`~lightning_prune.FilterPruningCallback`.

    Attributes:
        record: what was removed so far, relative to the dense network; None before the first cut.
        history: a summary of every cut.
        copies: modules that are cut along -> the module of which each is a copy, by names in the LightningModule.

    Example:
        >>> from lightning_prune import FilterPruningCallback
        >>> isinstance(FilterPruningCallback({"macs": 0.5}), PruningCallback)
        True
    """

    def __init__(
        self,
        method: PruningMethod,
        retraining: Retraining,
        submodule: str | None,
        verbose: bool,
        compensate: bool | CompensationSettings = False,
        followers: Followers = None,
    ) -> None:
        super().__init__(method.timing, retraining, submodule, followers)
        self.method, self.verbose, self.compensation = method, verbose, TrainerCompensation(compensate)
        self._batch_seen = False
        self._final_status = (False, False)  # within budget and finished, when the last fit ended

    def __repr__(self) -> str:
        return description(type(self).__name__, self.policy, self.history, self.within_budget)

    def _repr_html_(self) -> str:
        return html_description(repr(self), self.history)

    @property
    def policy(self) -> PruningPolicy:
        """Budget, limits and exclusions."""
        return self.method.policy

    @property
    def criterion(self) -> CriterionLike:
        """The criterion that scores the units."""
        return self.method.criterion

    @property
    def within_budget(self) -> bool:
        """Whether the present network meets the budget; after training, whether it did at its end."""
        return self.method.is_within_budget(self._session) if self._session else self._final_status[0]

    @property
    def finished(self) -> bool:
        """Whether there will be no more cuts: the budget is met, or nothing is left to remove."""
        return self.method.is_finished(self._session) if self._session else self._final_status[1]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare checkpoints, and the method."""
        super().setup(trainer, pl_module, stage)
        self._batch_seen = False
        if stage == "fit":
            self.method.setup(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove all hooks."""
        self._final_status = (self.within_budget, self.finished)
        super().teardown(trainer, pl_module, stage)
        self.method.teardown(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check names and budget before training starts, if there is an example input."""
        self._resumption.on_fit_start(trainer)
        self.retraining.set_end(trainer)
        target_of(pl_module, self.submodule)
        if pl_module.example_input_array is not None:
            self._start_session(trainer, pl_module, as_example(pl_module.example_input_array))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the trainer, and restore the session of a checkpoint."""
        check_batches(trainer)
        check_recalibration(trainer, self.timing, self.retraining.batches)
        self._resumption.on_train_start(trainer)
        if (state := self._session_state) is not None:
            session = self._session or self._start_session(
                trainer, pl_module, example_of_shapes(state["example"])
            )
            session.load_state(state, self.criterion)
            self._session_state = None
        self.method.on_train_start(trainer, pl_module)
        if self.timing.by_steps:
            if self._state.last_handled < 0:
                self._state.last_handled = trainer.global_step
            self._prune_if_due(trainer, trainer.global_step)  # the checkpoint may be from just before a cut

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make a cut that the checkpoint still owed, and build new optimizers after a cut."""
        previous, is_owed = trainer.current_epoch - 1, self._resumption.between_epochs
        self._resumption.on_train_epoch_start(trainer)
        if is_owed and not self.timing.by_steps:
            self._prune_if_due(trainer, previous)  # the checkpoint was written before the epoch's cut
        if self.finished:
            self.retraining.start_final_phase(trainer, trainer.current_epoch)
        self.retraining.rebuild_pending_(trainer)
        self.method.on_train_epoch_start(trainer, self._session)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Trace on the first batch if there was no example input; observe the batch if it counts for a cut."""
        session = self._session
        if session is None:
            example = first_sample(batch, target_of(pl_module, self.submodule))
            session = self._start_session(trainer, pl_module, example)
        self.retraining.on_train_batch_start(trainer)
        if session.observer is None:
            criterion = self.method.criterion_to_observe(trainer, session)
            if criterion is not None and session.observe(criterion):
                check_observer(pl_module, session)
        if not self._batch_seen:
            self._batch_seen = True
            self.method.on_first_batch(trainer, session, batch)
        session.begin_batch()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Observe the gradients, unscaled and not clipped yet, before the method may change them."""
        if self._session:
            self._session.on_step(optimizer)
            if self._watch is not None:
                self._watch.on_step(optimizer)
            self.method.on_before_optimizer_step(trainer, self._session, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop observing outside of training batches; cut if it is due after this step."""
        if self._session:
            self._session.end_batch()
        if self._watch is not None and self.record is None:
            self._watch.on_batch_end()
        cuts = len(self.history)
        if self.timing.by_steps:
            self._prune_if_due(trainer, trainer.global_step)
        if len(self.history) > cuts and (metrics := self.history[-1].metrics):
            for logger in trainer.loggers:  # log_dict would wait for a multiple of log_every_n_steps
                logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=trainer.global_step)
        self._resumption.before_batch(trainer)  # after the cut, which may draw random numbers

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember that the present network is scored."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the random state with which training continues."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._resumption.before_batch(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut if it is due, and log."""
        metrics, cuts = self.method.epoch_metrics(trainer, self._session), len(self.history)
        self._resumption.on_train_epoch_end(trainer)
        if not self.timing.by_steps:
            self._prune_if_due(trainer, trainer.current_epoch)
        if self._session:
            pl_module.log_dict(size_metrics(self._session.graph, self._session.dense))
        if len(self.history) > cuts:
            metrics |= self.method.cut_metrics() | self.history[-1].metrics
        if metrics:
            pl_module.log_dict(metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if the budget was not met."""
        if session := self._session:
            if not self.policy.is_met(session.graph, session.dense):
                rank_zero_warn(budget_warning(self.policy, session.graph, session.dense, session.last_plan))
            self.method.on_train_end(trainer, session)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise ValueError if no batch was trained on, which Lightning passes over in silence."""
        self._resumption.on_fit_end(trainer)
        check_trained(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's and the method's state."""
        return {**super().state_dict(), **self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self.method.load_state_dict(state_dict)

    def _record_entry(self) -> dict[str, Any]:
        """Return the part of the checkpoint's entry that loading the weights needs."""
        return {**super()._record_entry(), "status": [self.within_budget, self.finished]}

    def _forget(self, trainer: L.Trainer, saved: Mapping[str, Any]) -> None:
        """Forget what belongs to the size that the network had before."""
        super()._forget(trainer, saved)
        self.method.forget()
        within_budget, finished = saved.get("status", (False, False))
        self._final_status = (bool(within_budget), bool(finished))

    def _start_session(
        self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example
    ) -> PruningSession:
        """Trace the network, and check all that can be checked before training."""
        self._take_over_record(pl_module)
        target = target_of(pl_module, self.submodule)
        check_no_average_inside(target)
        example = trainer.precision_plugin.convert_input(move_data_to_device(example, pl_module.device))
        with whole_network(pl_module, trainer.optimizers):
            session = self._state.start(self.policy, target, example, is_compiled(pl_module), detached_copy)
            self._find_copies(trainer, pl_module, session.graph)
        self.method.on_session_start(trainer, session, is_dense=self.record is None)
        return session

    def _prune_if_due(self, trainer: L.Trainer, now: int) -> None:
        """Cut at the end of epoch ``now``, or after as many steps, unless that was done already."""
        if not self._session:
            return
        is_due = self.method.is_due(trainer, self._session, now, self._state.last_handled)
        if is_due or self.method.retries(trainer, self._session, now):
            self._prune(trainer, self._session, now)
        self._state.last_handled = now

    def _prune(self, trainer: L.Trainer, session: PruningSession, now: int) -> None:
        """Make one cut, and adapt training to the smaller network."""
        epoch, step = (trainer.current_epoch, now) if self.timing.by_steps else (now, None)
        loop = TrainerLoop(self, self.method, self.compensation, trainer, session, now, epoch, self.verbose)
        self._state.cut_(loop, now, epoch, step)


def pruning_callbacks(trainer: L.Trainer) -> list[PruningCallback]:
    """Return the callbacks that prune ``trainer``'s network."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, PruningCallback)]
