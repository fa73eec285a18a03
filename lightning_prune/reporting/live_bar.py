"""One line at the bottom of the terminal: where in the epoch a run is, and how long the whole run still takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lightning_prune.reporting.run_clock import RunClock, number_of_epochs
from lightning_prune.utils.terminal import duration, is_live

__all__ = ["LiveBar"]

INTERVAL = 0.1  # seconds between two drawings
VALIDATION = 0.4  # cost of a batch of the validation set, in batches of training

#: seconds left and whole duration of a run -> seconds left of all runs of a sweep; None if unknown
SweepTime = Callable[[float, float], float | None]


class LiveBar(L.Callback):
    """Callback that draws a bar for the present epoch, on a terminal and in the first process only.

    The bar is drawn from the hooks of the batches, not by a thread: worker processes of loaders that are forked while
    a thread draws could wait for its lock for ever. Put it before the pruning callback: then it is gone before a cut.

    Args:
        prefix: text before the line.
        sweep_time: estimates the time until all runs of a sweep are finished.
        console: where to draw; None: on the terminal, if there is one.
    """

    def __init__(
        self, prefix: str = "", sweep_time: SweepTime | None = None, console: Console | None = None
    ) -> None:
        self.prefix, self.sweep_time = prefix, sweep_time
        self.console = console or (Console() if is_live() else None)
        self.clock = RunClock()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._drawn = 0.0

    def _begin(self, trainer: L.Trainer, name: str, total: float) -> None:
        """Show a new bar."""
        self._end()
        if self.console is None or not trainer.is_global_zero:
            return
        left = TextColumn("{task.fields[left]}", justify="right")
        columns = (TextColumn("{task.description}"), BarColumn(None), left)
        self._progress = Progress(
            *columns, console=self.console, auto_refresh=False, transient=True, expand=True
        )
        self._task = self._progress.add_task(self.prefix + name, total=total or None, left="")
        self._progress.start()

    def _move(self, amount: float, left: Callable[[], str] = str) -> None:
        """Move the bar on, and draw it if it was not drawn a moment ago."""
        if self._progress is None:
            return
        self._progress.advance(self._task, amount)
        now = time.monotonic()
        if now - self._drawn >= INTERVAL:
            self._progress.update(self._task, left=left())
            self._progress.refresh()
            self._drawn = now

    def _end(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _left(self, trainer: L.Trainer) -> str:
        """Return share of the epoch and time until the end of the run, and of the sweep, as text."""
        assert self._progress is not None
        task = self._progress.tasks[0]
        share = task.completed / task.total if task.total else 0.0
        parts = [f"{share:.0%}"]
        epochs = number_of_epochs(trainer)
        left = None if epochs is None else self.clock.seconds_left(share, epochs - trainer.current_epoch - 1)
        if left is not None:
            parts.append(f"{duration(left)} left")
            whole = None if self.sweep_time is None else self.sweep_time(left, left + self.clock.elapsed)
            parts += [] if whole is None else [f"all {duration(whole)}"]
        return " · ".join(parts)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar of the epoch."""
        self.clock.start_epoch()
        number = trainer.current_epoch + 1
        epochs = number_of_epochs(trainer)
        self._begin(trainer, f"epoch {number}" + (f"/{epochs}" if epochs else ""), self._work(trainer))

    def _work(self, trainer: L.Trainer) -> float:
        """Return the batches of an epoch; 0 if their number is unknown. Those of the validation set are cheaper."""
        every = trainer.check_val_every_n_epoch or 1
        validates = trainer.enable_validation and (trainer.current_epoch + 1) % every == 0
        val = VALIDATION * sum(trainer.num_val_batches) if validates else 0
        work = trainer.num_training_batches + val
        return float(work) if work < float("inf") else 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Move the bar on."""
        self._move(1, lambda: self._left(trainer))

    def on_train_epoch_end(self, *args: Any) -> None:
        """Remove the bar, before the pruning callback cuts."""
        self._end()

    def on_validation_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Show a bar for a validation outside of training."""
        if trainer.state.fn != "fit":
            self._begin(trainer, "validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Move the bar on, within training by the share that validation has of an epoch."""
        if trainer.state.fn != "fit":
            self._move(1)
        elif not trainer.sanity_checking:
            self._move(VALIDATION, lambda: self._left(trainer))

    def on_test_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Show a bar for the test."""
        self._begin(trainer, "test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *args: Any) -> None:
        """Move the bar on."""
        self._move(1)

    def on_exception(self, *args: Any) -> None:
        """Remove the bar; the terminal is as before."""
        self._end()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self._end()
