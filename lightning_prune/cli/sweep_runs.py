"""The runs in the folder of a sweep: which are finished, which were begun, and how long the rest takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_prune.cli.sweep_state import SweepState
from lightning_prune.reporting.run_folder import CONFIG, SAME_RUN, SUMMARY, Summary
from lightning_prune.trainer.checkpoint_io import last_checkpoint
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.hashing import json_digest
from lightning_prune.utils.terminal import duration

__all__ = ["Place", "configuration_digest", "finished_run", "refer_to", "unfinished_run"]

#: keys that do not change the results of a run
FREE = ("ckpt_path", "objective", "report", "table")


def configuration_digest(config: DictConfig, folder: Path) -> str:
    """Return a digest of all keys that determine the results of a run; paths in its folder count as relative ones.

    Args:
        config: of the run.
        folder: of the run.
    """
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    kept = {key: value for key, value in values.items() if key not in FREE}
    return json_digest(_relative(kept, os.path.abspath(folder)))


def _relative(node: Any, folder: str) -> Any:
    """Return plain values with a placeholder instead of the folder; JSON has strings as keys."""
    if isinstance(node, dict):
        return {str(key): _relative(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [_relative(value, folder) for value in node]
    return node.replace(folder, "RUN") if isinstance(node, str) else node


def _digest_of(run: Path) -> str:
    """Return the digest of the configuration in the folder of a run; empty if there is none."""
    if not (run / CONFIG).is_file():
        return ""
    config, notes = OmegaConf.load(run / CONFIG), run / ".hydra" / "hydra.yaml"
    folder = OmegaConf.load(notes).hydra.runtime.output_dir if notes.is_file() else run
    assert isinstance(config, DictConfig)
    return configuration_digest(config, Path(folder))


def _folders(sweep: Path) -> Iterator[Path]:
    yield from (path for path in sorted(sweep.glob("*")) if path.is_dir() and not (path / SAME_RUN).is_file())


def _summary_in(folder: Path) -> Summary | None:
    """Return the summary in the folder of a run; None if there is none that can be read."""
    try:
        return Summary.load(folder)
    except (OSError, ValueError):
        return None


def finished_run(sweep: Path, digest: str) -> tuple[Path, Summary] | None:
    """Return folder and summary of a completed run with this configuration; None if there is none."""
    for folder in _folders(sweep):
        summary = _summary_in(folder)
        if summary is not None and summary.status == "completed" and summary.configuration == digest:
            return folder, summary
    return None


def unfinished_run(sweep: Path, digest: str) -> Path | None:
    """Return the folder of a run with this configuration that was interrupted or killed and has a checkpoint."""
    for folder in _folders(sweep):
        summary = _summary_in(folder)
        begun = summary is None or summary.status == "interrupted"
        if begun and last_checkpoint(folder) is not None and _digest_of(folder) == digest:
            return folder
    return None


def refer_to(folder: Path, other: Path) -> None:
    """Note in the folder of a run that another one holds the results of its configuration."""
    write_text(folder / SAME_RUN, f"{os.path.relpath(other, folder)}\n")


@dataclass(frozen=True)
class Place:
    """The place of a run in its sweep.

    Attributes:
        number: of the run, from 1.
        runs: number of runs of the sweep; None if unknown.
        done: number of runs that are finished or have failed.
        seconds_per_run: mean time per run so far; None before the first has ended.
    """

    number: int
    runs: int | None = None
    done: int = 0
    seconds_per_run: float | None = None

    @classmethod
    def of(cls, sweep: Path, job: int) -> Place:
        """Return the place of a job of a sweep, by the notes and the runs in the sweep's folder."""
        state = SweepState.load(sweep)
        if state is None:
            return cls(job + 1)
        ends = [end for folder in _folders(sweep) if (end := _end_of(folder, state.started)) is not None]
        fresh = sum(moment >= state.started for moment in ends)
        # Other runs that are being trained at the same time are half done on average.
        begun = sum((folder / ".hydra").is_dir() for folder in _folders(sweep)) - len(ends) - 1
        elapsed = time.time() - state.started
        per_run = elapsed / (fresh + max(begun, 0) / 2) if fresh else None
        return cls(job + 1 + state.offset, state.runs, len(ends), per_run)

    @property
    def prefix(self) -> str:
        """The text before each line of the run.

        Example:
            >>> Place(3, 12).prefix, Place(3).prefix
            (' 3/12 │ ', '#3 │ ')
        """
        return (
            f"#{self.number} │ "
            if self.runs is None
            else f"{self.number:>{len(str(self.runs))}}/{self.runs} │ "
        )

    def describe(self) -> str:
        """Return how much of the sweep is done, and how long the rest takes.

        Example:
            >>> Place(4, 12, 3, 60.0).describe(), Place(1).describe()
            ('3 of 12 runs finished, about 9:00 min left', 'a run begins')
        """
        if self.runs is None:
            return "a run begins"
        text = f"{self.done} of {counted(self.runs, 'run')} finished"
        if self.seconds_per_run is None:
            return text
        return f"{text}, about {duration(self.seconds_per_run * max(self.runs - self.done, 0))} left"

    def seconds_left(self, run_left: float, run_total: float) -> float | None:
        """Return the time until all runs are finished; None if their number is unknown.

        Args:
            run_left: seconds that are left of this run.
            run_total: seconds that this run takes, for the others as long as none has ended.

        Example:
            >>> Place(1, 3).seconds_left(5, 10), Place(2, 3, 1, 20.0).seconds_left(5, 10)
            (25, 25.0)
        """
        if self.runs is None:
            return None
        others = max(self.runs - self.done - 1, 0)
        return run_left + others * (run_total if self.seconds_per_run is None else self.seconds_per_run)


def _end_of(folder: Path, start: float) -> float | None:
    """Return the time at which a run was completed, or failed since the start; None if it was neither."""
    summary = _summary_in(folder)
    if summary is None or summary.status not in ("completed", "failed"):
        return None
    end = (folder / SUMMARY).stat().st_mtime
    return end if summary.status == "completed" or end >= start else None
