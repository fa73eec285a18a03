"""The file ``sweep_state.json`` of a sweep: settings and status of its runs, to continue it when interrupted.

Nothing here imports torch: a command line is compared with the notes before anything is started.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import UsageError
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.objectives import check_directions, objective_names

__all__ = ["FREE_SUBDIR", "PENDING", "SweepState", "continued", "optuna_overrides"]

STATE = "sweep_state.json"
#: keys that may differ between a sweep and the command that goes on with it
FREE = ("objective", "report", "table", "hydra")
FREE_SUBDIR = (
    "lightning_prune.sum"  # resolver, so that a continued study does not write into folders it has filled
)
PENDING: list[SweepState] = []  # notes of the sweep that the command line asks for, until its folder is known
MOST_DIFFERENCES = 6  # that a message lists


@dataclass(frozen=True)
class SweepState:
    """Notes on a sweep.

    Attributes:
        overrides: of the command line.
        flags: of the command line, such as ``--config-dir``.
        first: the configuration of the first run, not resolved.
        runs: number of runs; None if the sweeper decides.
        offset: number of the first run that the command makes; above 0 in a study that goes on.
        status: ``"running"``, ``"finished"``, ``"interrupted"`` or ``"failed"``.
        started: time at which the command was started, in seconds since 1970.
    """

    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    first: dict[str, Any] = field(default_factory=dict)
    runs: int | None = None
    offset: int = 0
    status: str = "running"
    started: float = field(default_factory=time.time)

    def save(self, folder: Path) -> None:
        """Write the notes into the folder of the sweep."""
        write_text(folder / STATE, json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def load(cls, folder: Path) -> SweepState | None:
        """Read the notes in the folder of a sweep; None if there are none.

        Raises:
            ValueError: the file is damaged.
        """
        if not (folder / STATE).is_file():
            return None
        try:
            return cls(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / STATE} is damaged: {error}") from error

    def with_status(self, status: str) -> SweepState:
        """Return a copy with another status."""
        return replace(self, status=status)

    def command(self, folder: Path) -> str:
        """Return the command line that continues the sweep in ``folder``.

        Example:
            >>> SweepState(["seed=1,2"], ["--config-dir", "my nets"]).command(Path("multirun/a"))
            "lightning-prune -m --config-dir 'my nets' seed=1,2 hydra.sweep.dir=multirun/a"
        """
        own = f"hydra.sweep.dir={folder}"
        words = [word for word in self.overrides if not word.startswith("hydra.sweep.dir=")]
        return shlex.join(["lightning-prune", "-m", *self.flags, *words, own])


def continued(words: TrainArguments, config: DictConfig) -> list[str]:
    """Prepare the notes of a sweep, and return the overrides that let it go on if its folder holds it already.

    Args:
        words: the command line.
        config: the configuration of its first run, with the node ``hydra``.

    Raises:
        UsageError: the folder holds another sweep, or one that cannot go on.
    """
    first = OmegaConf.to_container(
        OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    )
    assert isinstance(first, dict)
    flags = ["--config-dir", str(words.config_dir)] if words.config_dir else []
    runs = number_of_runs([word for word in words.overrides if not is_free(word)], config.hydra.sweeper)
    state = SweepState(words.overrides, flags, {str(key): value for key, value in first.items()}, runs)
    folder = Path(config.hydra.sweep.dir)
    PENDING[:] = [state]
    try:
        former = SweepState.load(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if former is not None:
        check_same_sweep(state, former, folder)
    if "optuna" not in config.hydra.sweeper._target_:
        return []
    _check_search(config)
    finished, overrides = optuna_overrides(config.hydra.sweeper, former is not None)
    PENDING[:] = [replace(state, offset=finished)]
    if number := first_free_number(folder):
        overrides.append(f"hydra.sweep.subdir='${{{FREE_SUBDIR}:${{hydra.job.num}},{number}}}'")
    return overrides


def _check_search(config: DictConfig) -> None:
    """Compare the directions of Optuna's search with the objectives; print what is probably wrong.

    Raises:
        UsageError: their numbers differ.
    """
    given = config.hydra.sweeper.direction
    directions = list(given) if isinstance(given, ListConfig) else [given]
    names = [getattr(direction, "name", str(direction)) for direction in directions]
    try:
        warning = check_directions(objective_names(config.get("objective")), names)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if warning:
        print(f"lightning-prune: {warning}", file=sys.stderr, flush=True)


def number_of_runs(overrides: Sequence[str], sweeper: DictConfig) -> int | None:
    """Return how many runs a sweep makes; None if that cannot be said.

    Args:
        overrides: of the command line.
        sweeper: the node ``hydra.sweeper``.

    Example:
        >>> number_of_runs(["seed=1,2,3", "prune=l1,l2"], OmegaConf.create({"params": None}))
        6
    """
    if sweeper.get("n_trials"):
        return int(sweeper.n_trials)
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*params, *overrides])
        return sum(map(len, BasicSweeper.split_arguments(parsed, None)))
    except HydraException:
        return None


def check_same_sweep(state: SweepState, former: SweepState, folder: Path) -> None:
    """Raise an error if ``state``, that of a new command, is not that of the ``former`` sweep in the folder.

    Raises:
        UsageError: it is another sweep: settings or their order differ.
    """
    pairs = (without_free(former.overrides), without_free(state.overrides))
    lines = (
        [f"  then: {shlex.join(pairs[0])}", f"  now:  {shlex.join(pairs[1])}"] if pairs[0] != pairs[1] else []
    )
    changed = list(differences(former.first, state.first)) if former.first and state.first else []
    lines += [f"  {line}" for line in changed[:MOST_DIFFERENCES]]
    if lines:
        reason = f"{folder} holds another sweep, which this command cannot go on with:"
        raise UsageError("\n".join([reason, *lines, "choose another folder: hydra.sweep.dir=..."]))


def without_free(overrides: Sequence[str]) -> list[str]:
    """Return overrides without those that do not change a run.

    Example:
        >>> without_free(["seed=1,2", "objective=macs", "hydra.sweep.dir=a", "hydra/sweeper=optuna"])
        ['seed=1,2']
    """
    return [word for word in overrides if not is_free(word)]


def is_free(override: str) -> bool:
    """Return whether an override is of a key that does not change a run."""
    return override.lstrip("+~").split("=")[0].replace("/", ".").split(".")[0] in FREE


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the keys in which two configurations differ, with both values.

    Example:
        >>> list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}))
        ['a.b: 1, now 3']
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            if path or key not in FREE:
                name = f"{path}.{key}" if path else str(key)
                yield from differences(before.get(key), after.get(key), name)
    elif before != after:
        yield f"{path}: {before}, now {after}"


def optuna_overrides(sweeper: DictConfig, continues: bool) -> tuple[int, list[str]]:
    """Return how many trials a study has finished, and the overrides with which Optuna makes those that are left.

    A study in a storage begins with the trials that had no result. Without a storage the sampler gets a seed: then
    Optuna proposes the same trials again, and those that are finished are recognised.

    Args:
        sweeper: the node ``hydra.sweeper``.
        continues: whether the sweep was begun before.
    """
    seed = sweeper.sampler.get("seed")
    if not sweeper.storage:
        unseeded = "seed" in sweeper.sampler and seed is None
        return 0, ["hydra.sweeper.sampler.seed=0"] if unseeded else []
    finished, trials = _requeue(str(sweeper.storage), sweeper.study_name) if continues else (0, 0)
    overrides = [f"hydra.sweeper.n_trials={max(int(sweeper.n_trials) - finished, 0)}"] if finished else []
    if trials and seed is not None:  # else the sampler would propose the trials of its first start again
        overrides.append(f"hydra.sweeper.sampler.seed={int(seed) + trials}")
    return finished, overrides


def _requeue(storage: str, name: str | None) -> tuple[int, int]:
    """Have a study begin with the trials that had no result; return the numbers of finished and of all trials."""
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except (KeyError, ValueError):  # there is no study yet
        return 0, 0
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        if trial.params:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # enqueue_trial is marked as experimental
                study.enqueue_trial(trial.params)
    return len(study.get_trials(states=(states.COMPLETE,))), len(study.trials)


def first_free_number(folder: Path) -> int:
    """Return the lowest number above those of all runs in the folder of a sweep."""
    numbers = (int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdecimal())
    return max(numbers, default=-1) + 1
