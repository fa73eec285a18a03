"""One run of a sweep: skipped if it is finished, continued if it was begun, and its objective for the sweeper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_prune.cli.sweep_runs import Place, configuration_digest, finished_run, refer_to, unfinished_run
from lightning_prune.cli.sweep_state import SweepState
from lightning_prune.reporting.live_bar import SweepTime
from lightning_prune.reporting.objective import objective_values
from lightning_prune.reporting.run_folder import CONFIG, SAME_RUN, SUMMARY, Summary
from lightning_prune.trainer.checkpoint_io import last_checkpoint
from lightning_prune.utils.objectives import objective_names
from lightning_prune.utils.terminal import fitted

__all__ = ["sweep_job"]

Run = Callable[[DictConfig, str, SweepTime, bool], Summary | None]


def sweep_job(
    sweep: Path, folder: Path, job: int, run: Run, config: DictConfig
) -> float | tuple[float, ...] | None:
    """Make one run of a sweep, unless it is finished, and return its objective; None if it has failed.

    Args:
        sweep: folder of the sweep.
        folder: of the run.
        job: number of the run, from 0, in this command.
        run: makes the run with a configuration, a prefix for its lines, an estimate of the time of all runs, and
            whether to print at its start what is trained.
        config: of the run.

    Raises:
        SystemExit: the folder holds a finished run of another configuration.
    """
    digest, place = configuration_digest(config, folder), Place.of(sweep, job)
    if (finished := finished_run(sweep, digest)) is not None:
        return _skipped(folder, *finished, place.prefix, config)
    _check_free(folder)
    (folder / SAME_RUN).unlink(missing_ok=True)
    if (begun := unfinished_run(sweep, digest)) is not None:
        config = config.copy()
        config.ckpt_path = str(last_checkpoint(begun))
        print(f"{place.prefix}goes on from {config.ckpt_path}", flush=True)
    words = " · ".join([place.describe(), *_varying(sweep)])
    print(fitted(place.prefix + words, " " * len(place.prefix)), flush=True)
    summary = run(config, place.prefix, place.seconds_left, place.number == 1)
    if begun is not None and begun.resolve() != folder.resolve():
        refer_to(begun, folder)
    return None if summary is None else _values(summary.objective)


def _varying(sweep: Path) -> list[str]:
    """Return the overrides of the present run that are not those of all runs."""
    state = SweepState.load(sweep)
    common = set() if state is None else {word.lower() for word in state.overrides}
    return [str(word) for word in HydraConfig.get().overrides.task if word.lower() not in common]


def _skipped(
    folder: Path, finished: Path, summary: Summary, prefix: str, config: DictConfig
) -> float | tuple[float, ...] | None:
    """Return the objective of a run that was finished before."""
    if finished.resolve() != folder.resolve():
        refer_to(folder, finished)
    objective = objective_values(objective_names(config.get("objective")), summary)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in objective.items())
    print(f"{prefix}finished before: {finished} · {shown}", flush=True)
    return _values(objective)


def _values(objective: dict[str, float]) -> float | tuple[float, ...] | None:
    """Return one value, or a tuple of several, as sweepers expect it.

    Example:
        >>> _values({"val/miou": 0.5}), _values({"val/miou": 0.5, "macs": 3.0})
        (0.5, (0.5, 3.0))
    """
    values = tuple(objective.values())
    return values[0] if len(values) == 1 else values or None


def _check_free(folder: Path) -> None:
    """Raise SystemExit if a folder holds a finished run, which would be overwritten."""
    if (folder / SUMMARY).is_file() and Summary.load(folder).status == "completed":
        raise SystemExit(
            f"{folder} holds a finished run of another configuration ({folder / CONFIG}): the sweep cannot go on "
            "in this folder; choose another one: hydra.sweep.dir=..."
        )
