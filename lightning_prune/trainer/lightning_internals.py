"""Access to Lightning's private members: the only module that imports, reads, sets or overrides them.

Each docstring names the private member and says why no public interface does the same. For each of them
``tests/trainer/test_lightning_internals.py`` has a test, so that a release of Lightning that changes one fails there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

#: Where a loop gets its loader from: a hook of a module or data module, or a loader passed to ``Trainer.fit``.
#: Lightning's ``_DataLoaderSource``; the trainer has no public hook that replaces a loader before it is used.
DataLoaderSource = _DataLoaderSource


# -- training data ---------------------------------------------------------------------------------------------


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """Return the callbacks of a trainer: Lightning's attribute has no type annotation."""
    return trainer.callbacks  # type: ignore[attr-defined]


def training_source(trainer: L.Trainer) -> DataLoaderSource:
    """Return ``FitLoop._data_source``. The trainer publishes only the loaders that were made from it."""
    return trainer.fit_loop._data_source


def set_training_source(trainer: L.Trainer, source: DataLoaderSource) -> None:
    """Set ``FitLoop._data_source``. Public attributes of the trainer cannot replace the training loader."""
    trainer.fit_loop._data_source = source


def training_loader(trainer: L.Trainer) -> CombinedLoader | None:
    """Return ``FitLoop._combined_loader``, None before it is built. ``train_dataloader`` has lost the mode."""
    return trainer.fit_loop._combined_loader


def second_training_loader(
    trainer: L.Trainer, replacement: Callable[[Any], Any] = lambda loader: loader
) -> CombinedLoader | None:
    """Return a new loader over the same training data, which leaves the iterator of the epoch as it is.

    Reads ``CombinedLoader._mode``, how several loaders are combined: there is no public copy of it.

    Args:
        trainer: its training loader is read.
        replacement: returns what to use instead of each loader that is combined.
    """
    loader = training_loader(trainer)
    if loader is None:
        return None
    return CombinedLoader(tree_map(replacement, loader.iterables), loader._mode)


def before_batch_transfer(module: L.LightningModule, batch: Any, loader_index: int) -> Any:
    """Call ``LightningModule._on_before_batch_transfer``, which runs the hook of the module or data module.

    The public ``on_before_batch_transfer`` of the module ignores the one of the data module.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=loader_index)


def set_sampler_epoch(loader: object, epoch: int) -> None:
    """Call ``_set_sampler_epoch``: Lightning's way to seed a distributed sampler has no public name."""
    _set_sampler_epoch(loader, epoch)


def is_stateful(loader: object) -> bool:
    """Return whether Lightning itself restores the position of a loader: its check is ``_Stateful``."""
    return isinstance(loader, _Stateful)


# -- loops -----------------------------------------------------------------------------------------------------


def prefetcher(trainer: L.Trainer) -> _PrefetchDataFetcher | None:
    """Return ``FitLoop._data_fetcher`` if it draws batches ahead of their steps, else None.

    No public attribute gives the iterator of the running epoch.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher if isinstance(fetcher, _PrefetchDataFetcher) else None


def all_batches_started(trainer: L.Trainer) -> bool:
    """Call ``_TrainingEpochLoop._num_ready_batches_reached``; the public ``is_last_batch`` does not count batches.

    That function compares by ``==``: it has to be told if the epoch now has fewer batches than were started.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.is_last_batch |= progress.current.ready > trainer.num_training_batches
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_validation_due(trainer: L.Trainer) -> bool:
    """Call ``_TrainingEpochLoop._should_check_val_fx``: the rule combines five arguments of the trainer."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_accumulating(trainer: L.Trainer) -> bool:
    """Call ``_TrainingEpochLoop._should_accumulate``: whether the batch ends without an optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def count_step_of_batch(trainer: L.Trainer) -> None:
    """Add 1 to ``_TrainingEpochLoop._batches_that_stepped``, the step number of loggers, which is read-only."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += 1


def end_restart(trainer: L.Trainer) -> None:
    """Clear ``FitLoop._restarting``. The public setter of ``restarting`` also sets it for all loops inside."""
    trainer.fit_loop._restarting = False


def fetch_after_epoch_start(trainer: L.Trainer) -> None:
    """Clear ``FitLoop._resuming_from_checkpoint``: the epoch then draws its batches after the hooks of its start.

    The public ``is_resuming`` can only be read.
    """
    trainer.fit_loop._resuming_from_checkpoint = False


def may_stop_early(trainer: L.Trainer) -> bool:
    """Return ``FitLoop._can_stop_early``: whether ``min_epochs`` and ``min_steps`` allow ``should_stop``."""
    return trainer.fit_loop._can_stop_early


def reset_loop(loop: Any) -> None:
    """Call ``_reset_progress``: set all counters of a loop to 0, as Lightning does after its sanity check."""
    _reset_progress(loop)


# -- trainer, strategy, module ---------------------------------------------------------------------------------


def call_callbacks(trainer: L.Trainer, hook: str) -> None:
    """Call a hook of all callbacks, by ``_call_callback_hooks``, which also names the hook in profiles."""
    call._call_callback_hooks(trainer, hook)


def forget_logged(trainer: L.Trainer) -> None:
    """Delete all logged values from ``Trainer._logger_connector``: ``callback_metrics`` can only be read."""
    trainer._logger_connector.reset_results()
    trainer._logger_connector.reset_metrics()


def expect_first_backward(strategy: DDPStrategy) -> None:
    """Clear ``DDPStrategy._pl_static_graph_delay_done``: a new static graph is delayed until its first backward.

    Lightning wraps a module once and has no public way to start again.
    """
    strategy._pl_static_graph_delay_done = False


def configured_optimizers(configured: Any) -> list[Optimizer]:
    """Return the optimizers in a result of ``configure_optimizers``, parsed by ``_configure_optimizers``.

    The result has six forms; Lightning parses it only inside ``Strategy.setup_optimizers``.
    """
    optimizers, _, _ = _configure_optimizers(configured)
    return optimizers


def is_unwrapped_compiled(module: L.LightningModule) -> bool:
    """Return whether the module came out of ``torch.compile``: Lightning unwraps it, and keeps ``_compiler_ctx``."""
    return module._compiler_ctx is not None


def is_local_path(path: str | Path) -> bool:
    """Call ``_is_local_file_protocol``: Lightning's own test which paths ``torch.save`` can write."""
    return _is_local_file_protocol(path)


def hand_over_worker_results() -> None:
    """Have launchers that start processes give the main process what callbacks of the first one hand over.

    ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` train in other processes; the main one gets back weights, the
    path of the best checkpoint, and metrics. A callback that defines ``worker_results(trainer) -> dict`` is asked
    after training in the first process, and ``on_worker_results(trainer, results, weights)`` of the same callback,
    by ``state_key``, is called in the main process before the weights are loaded.

    Calls ``_CallbackConnector._attach_model_callbacks``, and overrides
    ``_MultiProcessingLauncher.get_extra_results`` and ``_recover_results_in_main_process``: no callback has a hook
    in the main process.
    """
    launcher, key = _MultiProcessingLauncher, "lightning_prune"
    get, recover = launcher.get_extra_results, launcher._recover_results_in_main_process
    if hasattr(get, "_hands_over"):
        return

    @wraps(get)
    def get_extra_results(self: Any, trainer: L.Trainer) -> dict[str, Any]:
        callbacks: list[Any] = callbacks_of(trainer) if trainer.state.fn == TrainerFn.FITTING else []
        results = {
            it.state_key: it.worker_results(trainer) for it in callbacks if hasattr(it, "worker_results")
        }
        buffer = BytesIO()
        # As bytes, like Lightning's own: shared memory of tensors ends with the process.
        torch.save(results, buffer)
        return {**get(self, trainer), key: buffer.getvalue()}

    @wraps(recover)
    def _recover_results_in_main_process(self: Any, worker_output: Any, trainer: L.Trainer) -> None:
        packed = BytesIO(worker_output.extra[key])
        results = torch.load(packed, map_location="cpu", weights_only=True)
        if results and worker_output.weights_path is not None:
            if not results.keys() <= {it.state_key for it in callbacks_of(trainer)}:
                trainer._callback_connector._attach_model_callbacks()  # those that the module brings
            weights = self._strategy.checkpoint_io.load_checkpoint(worker_output.weights_path)
            for callback in callbacks_of(trainer):
                if callback.state_key in results and hasattr(callback, "on_worker_results"):
                    callback.on_worker_results(trainer, results[callback.state_key], weights)
        recover(self, worker_output, trainer)

    get_extra_results._hands_over = True  # type: ignore[attr-defined]
    launcher.get_extra_results = get_extra_results  # type: ignore[method-assign]
    launcher._recover_results_in_main_process = _recover_results_in_main_process  # type: ignore[method-assign]


hand_over_worker_results()


# -- callbacks -------------------------------------------------------------------------------------------------


def swa_average(swa: StochasticWeightAveraging) -> nn.Module | None:
    """Return ``StochasticWeightAveraging._average_model``, None before ``setup``: no public attribute has it."""
    return swa._average_model


def swa_scheduler(swa: StochasticWeightAveraging) -> Any:
    """Return ``StochasticWeightAveraging._swa_scheduler``, None before averaging: no public attribute has it."""
    return swa._swa_scheduler


def swa_last_epoch(swa: StochasticWeightAveraging) -> int | None:
    """Return the last epoch that is averaged; None if training has no last epoch.

    Reads ``StochasticWeightAveraging._max_epochs``: the public ``swa_end`` raises where that is -1.
    """
    return None if swa._max_epochs == -1 else swa.swa_end


class ConditionalCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` with two public hooks, for what is monitored and for whether a model may be saved.

    Overrides ``_monitor_candidates`` and ``_save_topk_checkpoint``: public hooks come only before or after both.
    """

    def monitored(self, trainer: L.Trainer, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values to choose from: metric -> value."""
        return values

    def may_save(self, trainer: L.Trainer) -> bool:
        """Return whether the present model is compared with those that were saved."""
        return True

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        return self.monitored(trainer, super()._monitor_candidates(trainer))

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.may_save(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)


class ConditionalEarlyStopping(EarlyStopping):
    """``EarlyStopping`` with a public hook for whether an epoch is compared with the best one.

    Overrides ``_run_early_stopping_check``: Lightning calls it from two public hooks and offers none in it.
    """

    def may_check(self, trainer: L.Trainer) -> bool:
        """Return whether this epoch is compared; an epoch that is not does not use up patience."""
        return True

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        if self.may_check(trainer):
            super()._run_early_stopping_check(trainer)


# -- loggers ---------------------------------------------------------------------------------------------------


class LastingCSVWriter(ExperimentWriter):
    """Writer of a CSV file that does not delete an earlier one.

    Overrides ``_check_log_dir_exists``, which deletes it, and ``_rewrite_with_new_header``: no public method of a
    logger decides about either.
    """

    def rewrite(self, columns: list[str]) -> None:
        """Write the file again, with other columns."""
        super()._rewrite_with_new_header(columns)

    def _check_log_dir_exists(self) -> None:
        """Leave the file as it is."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite(fieldnames)
