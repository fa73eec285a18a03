"""The best of those that meet the budget: checkpoints and early stopping (level 4).

While a network is being pruned the largest model usually scores best, so that ``ModelCheckpoint`` keeps one that
nobody asked for, and ``EarlyStopping`` ends training before the budget is met. Here a model *competes* only if it is
within the budget and was scored as it is: an epoch that ended with a cut validated the larger network, one with a cut
in its middle the smaller one. Without a pruning callback every model competes, so that a dense baseline runs with the
same configuration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.pruning import pruning_callbacks
from lightning_prune.serialization.saving import SavedNetwork, read_network, write_safetensors
from lightning_prune.trainer.training_state import callbacks_of
from lightning_prune.utils.arguments import check_choice

__all__ = ["BestOfLast", "BudgetCheckpoint", "BudgetEarlyStopping", "Monitor", "best_weights", "competes"]

#: what decides: the name of a logged metric, or a function of trainer and module
Monitor = str | Callable[[L.Trainer, L.LightningModule], float]


def competes(trainer: L.Trainer) -> bool:
    """Whether the network is within every budget and has not been cut since it was last validated."""
    return all(c.within_budget and c.scored_as_it_is(trainer) for c in pruning_callbacks(trainer))


def metric_name(value: Monitor) -> str:
    """What the value is called in file names and messages.

    Example:
        >>> name_of("val/miou"), name_of(lambda trainer, module: 0.0)
        ('val/miou', 'value')
    """
    name = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    return name if isinstance(value, str) or name.isidentifier() else "value"


def metric_value(value: Monitor, trainer: L.Trainer) -> Tensor | None:
    """The value now; None if no such metric was logged."""
    if isinstance(value, str):
        return trainer.callback_metrics.get(value)
    return torch.tensor(float(value(trainer, trainer.lightning_module)))


class BudgetCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` in which only models compete that meet the budget.

    To be able to resume at any time, add a plain ``ModelCheckpoint`` as well: this one writes nothing before the
    budget is met.

    Args:
        monitor: name of a logged metric, or a function ``(trainer, module) -> float``, the same on all ranks.
        mode: ``"min"`` or ``"max"``: which values are good.
        kwargs: everything else that ``ModelCheckpoint`` takes.

    Example:
        >>> keep = BudgetCheckpoint(monitor="val/miou", mode="max", save_top_k=2)
        >>> keep.monitor, keep.mode, keep.save_top_k
        ('val/miou', 'max', 2)
    """

    def __init__(self, monitor: Monitor, mode: str = "min", **kwargs: Any) -> None:
        super().__init__(monitor=metric_name(monitor), mode=mode, **kwargs)
        self.value = monitor

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if no model competed."""
        super().on_train_end(trainer, pl_module)
        _warn_unless(bool(self.best_model_path), self)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        found = super()._monitor_candidates(trainer)
        if not isinstance(self.value, str) and competes(trainer):
            found[str(self.monitor)] = metric_value(self.value, trainer)  # type: ignore[assignment]
        return found

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if competes(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)


class BudgetEarlyStopping(EarlyStopping):
    """``EarlyStopping`` whose patience begins when pruning is over: budget met, or nothing left to remove.

    A value that is not finite stops training at any time, unless ``check_finite=False``.

    Args:
        monitor: name of a logged metric, or a function ``(trainer, module) -> float``, the same on all ranks.
        kwargs: everything else that ``EarlyStopping`` takes.

    Example:
        >>> stop = BudgetEarlyStopping(monitor="val/loss", patience=5)
        >>> stop.monitor, stop.patience
        ('val/loss', 5)
    """

    def __init__(self, monitor: Monitor, **kwargs: Any) -> None:
        super().__init__(monitor=metric_name(monitor), **kwargs)
        self.value = monitor

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        value = metric_value(self.value, trainer)
        if value is not None:
            trainer.callback_metrics[self.monitor] = value
        diverged = value is not None and self.check_finite and not bool(torch.isfinite(value))
        over = all(c.finished and c.scored_as_it_is(trainer) for c in pruning_callbacks(trainer))
        if over or diverged:
            super()._run_early_stopping_check(trainer)


class BestOfLast(Checkpoint):
    """Keeps the last ``k`` models that compete in memory, and writes the most promising one when training ends.

    Nothing touches the disk before. The models are those of the ends of epochs; they take ``k`` times the
    memory of the weights, on the CPU, and are not part of a checkpoint: a resumed run collects anew.

    Args:
        path: of the safetensors file to write; :func:`~lightning_prune.serialization.saving.load_pruned` reads it.
        k: how many.
        monitor: name of a logged metric, or a function ``(trainer, module) -> float``.
        mode: ``"min"`` or ``"max"``: which values are good.

    Attributes:
        best_value: of the model that was written; None before.

    Raises:
        ValueError: ``k`` is below 1, or ``mode`` is something else; when an epoch ends: no such metric.

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
        self._kept: deque[tuple[float, SavedNetwork]] = deque(maxlen=k)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the model, if it competes."""
        if not competes(trainer):
            return
        value = metric_value(self.value, trainer)
        if value is None:
            known = ", ".join(trainer.callback_metrics)
            raise ValueError(f"no metric {self.value!r} was logged; there are {known or 'none'}")
        weights = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()}
        pruning = next(iter(pruning_callbacks(trainer)), None)
        record, submodule = (pruning.record, pruning.submodule) if pruning else (None, None)
        self._kept.append((float(value), SavedNetwork(weights, record, submodule or "")))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the most promising one."""
        _warn_unless(bool(self._kept), self)
        if self._kept:
            choose = min if self.mode == "min" else max
            self.best_value, saved = choose(reversed(self._kept), key=lambda kept: kept[0])
            rank_zero_only(write_safetensors)(saved, self.path)


def best_weights(trainer: L.Trainer) -> dict[str, Tensor] | None:
    """The weights that a callback of this module wrote as the best ones, by their names in the LightningModule."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, BudgetCheckpoint) and callback.best_model_path:
            return read_network(Path(callback.best_model_path)).weights
        if isinstance(callback, BestOfLast) and callback.best_value is not None:
            return read_network(callback.path).weights
    return None


def _warn_unless(found: bool, callback: L.Callback) -> None:
    if not found:
        rank_zero_warn(
            f"{type(callback).__name__} wrote nothing: at the end of no epoch was the network within the budget and "
            "uncut in that epoch. Train for longer after the last cut, or loosen the limits"
        )
