"""Configurations: where they are, how a finished run's is loaded, and how their errors are shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.utils.hints import did_you_mean


class UsageError(ValueError):
    """A command line that cannot be run; its text says why, and what to type instead."""


#: errors that a wrong configuration or wrong data raises; all others are shown with their traceback
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    NotImplementedError,
    OmegaConfBaseException,
    InstantiationException,
)

#: former name of a class in configurations, before modules moved into packages -> its name; both in lightning_prune
RENAMED_TARGETS = {
    "best.BestOfLast": "BestOfLast",
    "best.BudgetCheckpoint": "BudgetCheckpoint",
    "best.BudgetEarlyStopping": "BudgetEarlyStopping",
    "callback.FilterPruningCallback": "FilterPruningCallback",
    "candidates.Workers": "netadapt.Workers",
    "checkpoint_io.AtomicCheckpointIO": "AtomicCheckpointIO",
    "latency_table.LatencyTable": "LatencyTable",
    "limits.Limits": "Limits",
    "losses.CrossEntropy": "segmentation.CrossEntropy",
    "losses.EpochRamp": "segmentation.EpochRamp",
    "losses.WeightedSum": "segmentation.WeightedSum",
    "netadapt_callback.NetAdaptCallback": "NetAdaptCallback",
    "networks.AtomMobile": "segmentation.AtomMobile",
    "networks.RITnet": "segmentation.RITnet",
    "networks.UNet": "segmentation.UNet",
    "retraining.FinalPhase": "FinalPhase",
    "ritnet_losses.EdgeWeightedCrossEntropy": "segmentation.EdgeWeightedCrossEntropy",
    "ritnet_losses.GeneralisedDice": "segmentation.GeneralisedDice",
    "ritnet_losses.SurfaceLoss": "segmentation.SurfaceLoss",
    "rounds.Rounds": "netadapt.Rounds",
    "schedules.Cubic": "Cubic",
    "schedules.Curve": "Curve",
    "schedules.Linear": "Linear",
    "schedules.OneShot": "OneShot",
    "slimming.SlimmingCallback": "SlimmingCallback",
    "still.StillEpoch": "callbacks.frozen_epoch.FrozenEpoch",
    "sweep.SweepTable": "SweepTable",
    "visdom_logger.VisdomLogger": "VisdomLogger",
}
PREFIX = "lightning_prune."


def conf_dir() -> Path:
    """Return the folder of configurations: inside the installed package, else at the top of the checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no conf/config.yaml in {package} or {package.parent}: reinstall lightning-prune"
    )


def load_config(run: Path) -> DictConfig:
    """Return the configuration in the folder of a run, with today's names of classes.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    from lightning_prune.reporting.run_folder import CONFIG  # imports torch

    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run} holds no run: there is no {run / CONFIG}")
    add_own_folders(run)
    config = OmegaConf.create(_with_current_targets(OmegaConf.to_container(OmegaConf.load(run / CONFIG))))
    assert isinstance(config, DictConfig)
    return config


def add_to_path(*folders: Path | None) -> None:
    """Append folders to the places that Python imports from, for the networks and data of a user.

    None, folders that do not exist and those that are there already are left out.
    """
    for folder in folders:
        if folder is not None and folder.is_dir() and str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))


def add_own_folders(run: Path) -> None:
    """Add to ``sys.path`` the folder in which the run in folder ``run`` was started, and its ``--config-dir``."""
    notes = run / ".hydra" / "hydra.yaml"
    if not notes.is_file():
        return
    runtime = OmegaConf.load(notes).hydra.runtime
    own = [source.path for source in runtime.config_sources if source.provider == "command-line"]
    add_to_path(*map(Path, own), Path(runtime.cwd))


def _with_current_targets(node: Any) -> Any:
    """Return a part of a configuration with every ``_target_`` translated."""
    if isinstance(node, dict):
        return {
            key: current_target(value) if key == "_target_" else _with_current_targets(value)
            for key, value in node.items()
        }
    return [_with_current_targets(value) for value in node] if isinstance(node, list) else node


def current_target(target: str) -> str:
    """Translate the name of a class in a configuration of an earlier version; other names stay.

    Example:
        >>> current_target("lightning_prune.networks.UNet"), current_target("torch.optim.Adam")
        ('lightning_prune.segmentation.UNet', 'torch.optim.Adam')
    """
    name = target.removeprefix(PREFIX)
    return PREFIX + RENAMED_TARGETS[name] if target.startswith(PREFIX) and name in RENAMED_TARGETS else target


def overrides_as_dict(overrides: Iterable[str]) -> dict[str, str]:
    """Return overrides of the command line as key -> value.

    Example:
        >>> overrides_as_dict(["prune.criterion.omega=0", "+a=b=c", "~x"])
        {'prune.criterion.omega': '0', 'a': 'b=c', 'x': ''}
    """
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def root_cause(error: BaseException) -> str:
    """Describe the first error in a chain of causes, and the key of the configuration where it was raised.

    Example:
        >>> try:
        ...     raise InstantiationException("...\\nfull_key: prune.criterion") from ValueError("omega is 2")
        ... except InstantiationException as error:
        ...     root_cause(error)
        'prune.criterion: ValueError: omega is 2'
    """
    if isinstance(error, UsageError):
        return str(error)
    lines = str(error).splitlines() if isinstance(error, InstantiationException) else []
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    while error.__cause__ is not None:
        error = error.__cause__
    text = ": ".join([*keys, type(error).__name__, *filter(None, [str(error)])])
    hint = _target_hint(str(error)) if isinstance(error, (ImportError, AttributeError)) else ""
    return f"{text}; {hint}" if hint else text


def _target_hint(message: str) -> str:
    """Return the path that is most like one that cannot be imported, if its module is loaded; else "".

    Example:
        >>> _target_hint("No module named 'torch.optim.Adamm'")
        'did you mean torch.optim.Adam?'
    """
    for path in re.findall(r"'([A-Za-z_][\w.]*)'", message):
        parent, _, name = path.rpartition(".")
        if parent in sys.modules and (hint := did_you_mean(name, dir(sys.modules[parent]), f"{parent}.{{}}")):
            return hint
    return ""
