"""CSV logger that appends to the file of a training that is resumed."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.trainer.lightning_internals import LastingCSVWriter
from lightning_prune.utils.atomic import atomic_write

__all__ = ["ResumableCSVLogger", "complete_rows"]

Row = dict[str, Any]
PARENTS = 3  # folders around a checkpoint in which the log of its run is looked for


class ResumableCSVLogger(CSVLogger):
    """CSV logger whose file has every epoch once, also when a training was interrupted and resumed.

    Lightning's own logger deletes the file of an earlier training before a new one begins. This one replaces it with
    the first row that it writes, and keeps what was logged before that row if :meth:`resume` was called.
    ``lightning-prune`` calls it when a run goes on from a checkpoint. The arguments are those of Lightning's logger.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> for epoch in (0, 1):
        ...     logger = ResumableCSVLogger(folder.name, "csv", "")
        ...     logger.resume()
        ...     logger.log_metrics({"epoch": epoch, "loss": 0.5 - 0.2 * epoch}, step=epoch)
        ...     logger.save()
        >>> print(Path(folder.name, "csv", "metrics.csv").read_text(), end="")
        epoch,loss,step
        0,0.5,0
        1,0.3,1
        >>> folder.cleanup()
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the writer of the file, which is made with the first call."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment

    def resume(
        self, checkpoint: str | Path | None = None, epochs: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Keep the rows that were logged before the first new one; rows of a test are dropped, since it is repeated.

        Args:
            checkpoint: that the training goes on from: the rows are those of its run, which may be in another folder;
                None: those of the file in the folder of this logger.
            epochs: metrics of the epochs before, for those that the file lacks.
        """
        file = self._log_of(checkpoint)
        self.experiment.earlier = _with_missing([] if file is None else complete_rows(file), epochs)

    def _log_of(self, checkpoint: str | Path | None) -> Path | None:
        """Return the log of the run of a checkpoint; None if it cannot be found."""
        own = Path(self.experiment.metrics_file_path)
        if checkpoint is None:
            return own
        below = own.relative_to(Path(self.save_dir))
        places = (folder / below for folder in [*Path(checkpoint).absolute().parents][:PARENTS])
        return next((place for place in places if place.is_file()), None)


class _Writer(LastingCSVWriter):
    """Writer that replaces the file when the first row comes, and puts rows of an earlier training before it."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.earlier: list[Row] = []
        self._begun = False

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Record the metrics; the first ones decide which rows of an earlier training are kept."""
        super().log_metrics(metrics_dict, step)
        if not self._begun:
            first = _place(self.metrics[0])
            self._begin([row for row in self.earlier if _place(row) < first])
            self._begun = True

    def _begin(self, rows: Sequence[Row]) -> None:
        path = Path(self.metrics_file_path)
        self.metrics_keys = sorted({key for row in rows for key in row})
        if rows:
            _write(path, self.metrics_keys, rows)
        else:
            path.unlink(missing_ok=True)

    def rewrite(self, columns: list[str]) -> None:
        """Write the file again, with other columns, all at once."""
        path = Path(self.metrics_file_path)
        _write(path, columns, complete_rows(path))


def complete_rows(path: Path) -> list[Row]:
    """Return the rows of a CSV file: column -> text, without empty cells.

    A last line that does not end is left out: the process was killed while it wrote it. Without a file, none.

    Args:
        path: of the file.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        complete = [line for line in file if line.endswith("\n")]
    return [{name: text for name, text in row.items() if name and text} for row in csv.DictReader(complete)]


def _with_missing(rows: Sequence[Row], epochs: Iterable[Mapping[str, float]]) -> list[Row]:
    """Return the rows of training, completed by the metrics of epochs that they lack, in the order of the epochs.

    A process that is killed right after a checkpoint has not logged all metrics of the epoch.
    """
    kept = [row for row in rows if not any(name.startswith("test/") for name in row)]
    columns = {name for row in kept for name in row}
    logged = {(_place(row)[0], name) for row in kept for name in row}
    for epoch in epochs:
        wanted = [name for name in epoch if name != "epoch" and (name in columns or not columns)]
        missing = {name: epoch[name] for name in wanted if (epoch["epoch"], name) not in logged}
        kept += [{"epoch": epoch["epoch"], **missing}] if missing else []
    return sorted(kept, key=_place)


def _place(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return epoch and step of a row; a row without an epoch is before all epochs.

    Example:
        >>> _place({"epoch": "2", "step": "29"}), _place({"step": 7})
        ((2.0, 29.0), (-inf, 7.0))
    """
    return float(row.get("epoch", -math.inf)), float(row.get("step", -math.inf))


def _write(path: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
