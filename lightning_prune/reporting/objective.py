"""What a run returns to a sweeper: scores on the validation set and sizes of its final network, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_prune.reporting.run_folder import Summary
from lightning_prune.utils.hints import did_you_mean
from lightning_prune.utils.metrics import SCORE_LABELS
from lightning_prune.utils.objectives import SIZES

__all__ = ["ObjectiveCheck", "ObjectiveError", "objective_values"]


class ObjectiveError(ValueError):
    """Nothing logs the metric that a run should return; all runs of a sweep would fail alike."""


def objective_values(names: Sequence[str], summary: Summary) -> dict[str, float]:
    """Return name -> value of the objectives of a completed run.

    Metrics of the validation set are those of the final network; other metrics are the last that was logged.

    Args:
        names: of metrics and sizes; empty: mIoU or accuracy on the validation set, or else its loss.
        summary: results of the run.

    Raises:
        ObjectiveError: there is no value of a name.

    Example:
        >>> objective_values([], Summary(val={"loss": 0.3, "miou": 0.8}))
        {'val/miou': 0.8}
    """
    known = {name: value for row in summary.curves for name, value in row.items() if name != "epoch"}
    known |= summary.val | {f"val/{name}": value for name, value in summary.val.items()}
    if summary.final is not None:
        sizes = {name: getattr(summary.final, name) for name in SIZES}
        known |= {name: float(value) for name, value in sizes.items() if value is not None}
    default = (f"val/{name}" for name in (*SCORE_LABELS, "loss"))
    names = names or [name for name in default if name in known][:1]
    for name in names:
        if name not in known:
            raise ObjectiveError(_not_logged(name, list(known)))
    return {name: known[name] for name in names}


def _not_logged(name: str, known: Sequence[str], key: str = "objective") -> str:
    hint = did_you_mean(name, known, f"{key}={{}}")
    return f"{key}={name}: nothing logs this metric; there are {', '.join(known) or 'none'}; {hint}".rstrip(
        "; "
    )


class ObjectiveCheck(L.Callback):
    """Callback that ends a training after its first epoch if nothing logs a metric that it needs by name.

    Args:
        names: of metrics and sizes that the run returns.
        monitors: key of the configuration -> name of the metric that a callback or a scheduler watches.

    Raises:
        ObjectiveError: at the end of the first epoch or validation, nothing has logged one of the metrics.
    """

    def __init__(self, names: Sequence[str], monitors: Mapping[str, str] | None = None) -> None:
        self.names = [name for name in names if name not in SIZES]
        self.monitors = dict(monitors or {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if a watched metric of the validation is not logged, before the callback that needs it does."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for key, name in self.monitors.items():
            if name.startswith("val/") and name not in trainer.callback_metrics:
                raise ObjectiveError(_not_logged(name, list(trainer.callback_metrics), key))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the names with those of the metrics that were logged so far."""
        logged = [*trainer.callback_metrics, *trainer.logged_metrics]
        for name in self.names:
            if name not in logged:
                raise ObjectiveError(_not_logged(name, list(dict.fromkeys(logged))))
        self.names = []
