"""Checkpoints and early stopping that consider only models within the budget.

While a network is being pruned the largest model usually scores best, so that ``ModelCheckpoint`` keeps a model above
the budget, and ``EarlyStopping`` ends training before the budget is met. Here a model *competes* only if it is within
the budget and its scores are those of its present size: in an epoch that ended with a cut the larger network was
validated, in one with a cut in its middle the smaller one. Without a pruning callback every model competes, so that a
dense baseline runs with the same configuration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.method_callback import pruning_callbacks
from lightning_prune.serialization.saving import SavedNetwork, read_network, write_safetensors
from lightning_prune.trainer.lightning_internals import (
    ConditionalCheckpoint,
    ConditionalEarlyStopping,
    callbacks_of,
)
from lightning_prune.utils.arguments import check_choice

__all__ = ["BestOfLast", "BudgetCheckpoint", "BudgetEarlyStopping", "Monitor", "best_weights", "competes"]

#: the value that models are compared by: the name of a logged metric, or a function of trainer and module
Monitor = str | Callable[[L.Trainer, L.LightningModule], float]


def competes(trainer: L.Trainer) -> bool:
    """Return whether the network is within every budget and has not been cut since it was last validated."""
    return all(
        callback.within_budget and callback.has_current_score(trainer)
        for callback in pruning_callbacks(trainer)
    )


def metric_name(monitor: Monitor) -> str:
    """Return the name of a monitored value for file names and messages.

    Example:
        >>> metric_name("val/miou"), metric_name(lambda trainer, module: 0.0)
        ('val/miou', 'value')
    """
    if isinstance(monitor, str):
        return monitor
    name = getattr(monitor, "__name__", type(monitor).__name__)
    return name if name.isidentifier() else "value"


def metric_value(monitor: Monitor, trainer: L.Trainer) -> Tensor | None:
    """Return the present value of a metric or function; None if no metric of that name was logged."""
    if isinstance(monitor, str):
        return trainer.callback_metrics.get(monitor)
    return torch.tensor(float(monitor(trainer, trainer.lightning_module)))


class BudgetCheckpoint(ConditionalCheckpoint):
    """``ModelCheckpoint`` that saves only models within the budget.

    It writes nothing before the budget is met. To be able to resume at any time, add a plain ``ModelCheckpoint``.

    Args:
        monitor: name of a logged metric, or a function ``(trainer, module) -> float``, the same on all ranks.
        mode: ``"min"`` if smaller values are better, else ``"max"``.
        kwargs: all other arguments of ``ModelCheckpoint``.

    Example:
        >>> keep = BudgetCheckpoint(monitor="val/miou", mode="max", save_top_k=2)
        >>> keep.monitor, keep.mode, keep.save_top_k
        ('val/miou', 'max', 2)
    """

    def __init__(self, monitor: Monitor, mode: str = "min", **kwargs: Any) -> None:
        super().__init__(monitor=metric_name(monitor), mode=mode, **kwargs)
        self.value = monitor

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if no model competed."""
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path:
            _warn_nothing_written(self)

    def worker_results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return, in a process that a launcher started, where the best model is."""
        return {"best": str(self.best_model_path), "score": self.best_model_score}

    def on_worker_results(self, trainer: L.Trainer, results: Mapping[str, Any], weights: Any) -> None:
        """Take over the result of :meth:`worker_results` in the main process."""
        self.best_model_path, self.best_model_score = results["best"], results["score"]

    def monitored(self, trainer: L.Trainer, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the value of the function, if a function is monitored."""
        if not isinstance(self.value, str) and competes(trainer):
            values[str(self.monitor)] = metric_value(self.value, trainer)  # type: ignore[assignment]
        return values

    def may_save(self, trainer: L.Trainer) -> bool:
        """Return whether the model competes."""
        return competes(trainer)


class BudgetEarlyStopping(ConditionalEarlyStopping):
    """``EarlyStopping`` that begins when pruning has ended: the budget is met, or nothing is left to remove.

    A value that is not finite stops training at any time, unless ``check_finite=False``.

    Args:
        monitor: name of a logged metric, or a function ``(trainer, module) -> float``, the same on all ranks.
        kwargs: all other arguments of ``EarlyStopping``.

    Example:
        >>> stop = BudgetEarlyStopping(monitor="val/loss", patience=5)
        >>> stop.monitor, stop.patience
        ('val/loss', 5)
    """

    def __init__(self, monitor: Monitor, **kwargs: Any) -> None:
        super().__init__(monitor=metric_name(monitor), **kwargs)
        self.value = monitor

    def may_check(self, trainer: L.Trainer) -> bool:
        """Return whether pruning has ended, or the value is not finite; make the value known to ``EarlyStopping``."""
        value = metric_value(self.value, trainer)
        if value is not None:
            trainer.callback_metrics[self.monitor] = value
        diverged = value is not None and self.check_finite and not bool(torch.isfinite(value))
        ended = all(
            callback.finished and callback.has_current_score(trainer)
            for callback in pruning_callbacks(trainer)
        )
        return ended or diverged


class BestOfLast(Checkpoint):
    """Keeps the last ``k`` models that compete in memory, and writes the best of them when training ends.

    Nothing is written before. The models are those of the ends of epochs; they take ``k`` times the memory of the
    weights, on the CPU. They are not part of a checkpoint: a resumed run collects them anew.

    Args:
        path: the safetensors file to write; :func:`~lightning_prune.load_pruned` reads it.
        k: number of models to keep.
        monitor: name of a logged metric, or a function ``(trainer, module) -> float``.
        mode: ``"min"`` if smaller values are better, else ``"max"``.

    Attributes:
        best_value: value of the model that was written; None before.

    Raises:
        ValueError: ``k`` is below 1, or ``mode`` is neither; when an epoch ends: the metric was not logged.

    Example:
        >>> BestOfLast("best.safetensors", k=3, monitor="val/miou", mode="max").best_value is None
        True
    """

    def __init__(self, path: str | Path, k: int, monitor: Monitor, mode: str = "min") -> None:
        check_choice("mode", mode, ("min", "max"))
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.path, self.value, self.mode = Path(path), monitor, mode
        self.best_value: float | None = None
        self._models: deque[tuple[float, SavedNetwork]] = deque(maxlen=k)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the model in memory, if it competes."""
        if not competes(trainer):
            return
        value = metric_value(self.value, trainer)
        if value is None:
            names = ", ".join(trainer.callback_metrics)
            raise ValueError(f"no metric {self.value!r} was logged; there are {names or 'none'}")
        weights = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()}
        pruning = next(iter(pruning_callbacks(trainer)), None)
        if pruning is None:
            saved = SavedNetwork(weights, None)
        else:
            saved = SavedNetwork(weights, pruning.record, pruning.submodule or "", dict(pruning.copies))
        self._models.append((float(value), saved))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the best model, the latest of equally good ones; warn if there is none."""
        if not self._models:
            _warn_nothing_written(self)
            return
        choose = min if self.mode == "min" else max
        self.best_value, model = choose(reversed(self._models), key=lambda entry: entry[0])
        rank_zero_only(write_safetensors)(model, self.path)

    def worker_results(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return, in a process that a launcher started, the value of the model that was written."""
        return {"best": self.best_value}

    def on_worker_results(self, trainer: L.Trainer, results: Mapping[str, Any], weights: Any) -> None:
        """Take over the result of :meth:`worker_results` in the main process."""
        self.best_value = results["best"]


def best_weights(trainer: L.Trainer) -> dict[str, Tensor] | None:
    """Return the best weights that a callback of this module has written, by their names in the LightningModule.

    None if there is no such callback, or it has written nothing.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, BudgetCheckpoint) and callback.best_model_path:
            return read_network(Path(callback.best_model_path)).weights
        if isinstance(callback, BestOfLast) and callback.best_value is not None:
            return read_network(callback.path).weights
    return None


def _warn_nothing_written(callback: L.Callback) -> None:
    rank_zero_warn(
        f"{type(callback).__name__} wrote nothing: at the end of no epoch was the network within the budget and "
        "uncut in that epoch. Train for longer after the last cut, or loosen the limits"
    )
