"""Checks of a command line before torch is imported: what is misspelt, missing, or must be installed.

The configuration is composed as Hydra will compose it, of a sweep with the first value of each key. Errors name the
nearest key or option that exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import UsageError, conf_dir
from lightning_prune.cli.quoting import quoted
from lightning_prune.cli.surroundings import check_installed, check_writable
from lightning_prune.cli.value_checks import QUANTITIES, problems, unknown_quantity
from lightning_prune.utils.hints import did_you_mean
from lightning_prune.utils.objectives import check_objective, objective_names

__all__ = ["UsageError", "check", "check_values", "composed"]

MOST_VALUES = 50  # of one key in a sweep that are checked before it starts

#: mandatory key -> what it is, for the message that asks for it
MEANINGS = {
    "data.root": "the folder of the data",
    "task.num_classes": "the number of classes, background included",
    "task.in_channels": "the channels of the images: 3 for colour",
    "task.height": "the height of the images in pixels",
    "task.width": "the width of the images in pixels",
    "prune.criterion.path": "the import path of your scoring function",
    "prune.schedule.path": "the import path of your function of time",
}
EXAMPLES = {
    "data.root": "DIR",
    "task.num_classes": "5",
    "task.in_channels": "3",
    "task.height": "256",
    "task.width": "256",
}
AMOUNT = re.compile(r"(\w+)\s*:\s*([\d.e-]+)")
#: keys that the configuration may have, but has not by default
OTHER_BUDGETS = ("prune.budget.params", "prune.budget.activations", "prune.budget.latency")
QUOTES = (
    """text with brackets, commas or quotes needs quotes of its own: 'key="a, b"', a list: 'key=[a,"b c"]'"""
)
#: option of Hydra that comes with a package -> the extra that installs it
EXTRAS = {
    "hydra/sweeper/optuna": "sweeps",
    "hydra/launcher/joblib": "sweeps",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}


def check(arguments: TrainArguments) -> DictConfig | None:
    """Check whether a command line can be run, and return its configuration, with Hydra's own keys for a sweep.

    None if the configuration cannot be composed here.

    Raises:
        UsageError: it cannot be run.
    """
    if arguments.config_dir is not None and not arguments.config_dir.is_dir():
        raise UsageError(f"--config-dir: there is no folder {arguments.config_dir}")
    if any(item.lstrip("+").startswith("hydra.searchpath") for item in arguments.overrides):
        return None  # compose cannot add a folder to these, as Hydra does
    config = composed(arguments, with_hydra=True)
    _check_missing(config)
    check_installed(config)
    _check_objective(config)
    if arguments.sweeps:
        _check_sweep(config, arguments.overrides)
    elif not arguments.prints:
        check_values(config)
    if not arguments.prints:
        check_writable(config, "sweep" if arguments.sweeps else "run")
    return config


def _check_sweep(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UsageError if a value is of a wrong kind, or if all runs of a sweep would fail.

    If only some would, because their numbers are too small or too large, the table of the sweep says why.
    """
    others = [OmegaConf.from_dotlist([value]) for value in _others_of_sweep(overrides)]
    combined = [config, *(DictConfig(OmegaConf.merge(config, other)) for other in others)]
    for each in combined:
        _refuse(problems(each, ranges=False))
    wrong = list(map(problems, combined))
    if all(wrong):
        _refuse(wrong[0])


def check_values(config: Any, *groups: str) -> None:
    """Raise UsageError that names all values of a configuration that cannot be right.

    Args:
        config: composed.
        groups: names of the groups to look at; none: all of them.
    """
    _refuse([line for line in problems(config) if not groups or line.startswith(groups)])


def _refuse(wrong: Sequence[str]) -> None:
    """Raise UsageError that says what is wrong, if anything is."""
    if wrong:
        raise UsageError("\n".join(wrong))


def composed(arguments: TrainArguments, with_hydra: bool = False) -> DictConfig:
    """Compose the configuration; of a sweep the first one.

    Args:
        arguments: of the command line.
        with_hydra: whether to include the node ``hydra``.

    Raises:
        UsageError: a group, option or key does not exist, or an override cannot be read.
    """
    overrides = [quoted(each) for each in arguments.overrides]
    overrides = _first_of_sweep(overrides) if arguments.sweeps else overrides
    own = arguments.config_dir
    path = [] if own is None else [f"hydra.searchpath=[{_quoted_uri(own)}]"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return compose(arguments.config_name, [*path, *overrides], return_hydra_config=with_hydra)
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(_explained(error, arguments, path)) from error


def _quoted_uri(folder: Path) -> str:
    path = str(folder.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'file://{path}'"


def _first_of_sweep(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which each key that is swept has its first value; those without a list are left out."""
    parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    return list(filter(None, map(_first_value, parsed)))


def _first_value(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    if override.is_choice_sweep() or override.is_range_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return ""


def _others_of_sweep(overrides: Sequence[str]) -> Iterator[str]:
    """Yield ``KEY=VALUE`` for the values of swept keys after the first; options of groups are left out."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.is_choice_sweep() and "/" not in key and key not in _groups():
            values = islice(override.sweep_string_iterator(), 1, MOST_VALUES)
            yield from (f"{key}={value}" for value in values)


def _check_missing(config: DictConfig) -> None:
    """Raise UsageError for keys without a value, all of them at once."""
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    if missing := list(_missing(values)):
        lines = [f"  {key}=...  {MEANINGS.get(key, '')}".rstrip() for key in missing]
        example = " ".join(f"{key}={EXAMPLES.get(key, 'VALUE')}" for key in missing)
        raise UsageError("\n".join(["this needs a value for", *lines, f"add for example: {example}"]))


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """Yield the keys whose value is ``???``."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path


def _check_objective(config: DictConfig) -> None:
    try:
        check_objective(objective_names(config.get("objective")), config.get("latency_runs", 0))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _explained(error: Exception, arguments: TrainArguments, path: Sequence[str]) -> str:
    """Return an error of Hydra in words, with the nearest that exists."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if extra := EXTRAS.get(f"{group}/{option}"):
            command = f"  pip install 'lightning-prune[{extra}]'"
            return f"{group}={option} needs a package that is not installed:\n{command}"
        options = ", ".join(error.options)
        hint = did_you_mean(option, error.options, f"{group}={{}}")
        return _lines(f"Could not find {group}={option!r}.", hint, f"options: {options}")
    wrong = next((item for item in arguments.overrides if _fails(item, error)), "")
    if isinstance(error, ConfigCompositionException) and wrong:
        key = wrong.partition("=")[0]
        hint = _hint_for_key(wrong, arguments, path)
        return _lines(f"Could not override {key!r}: there is no such key.", hint)
    hint = QUOTES if isinstance(error, OverrideParseException) else ""
    return _lines(str(error).partition("\nSee http")[0], hint)


def _lines(*lines: str) -> str:
    return "\n".join(filter(None, lines))


def _hint_for_key(wrong: str, arguments: TrainArguments, path: Sequence[str]) -> str:
    """Return the key that is nearest to that of an override, among those of the groups that were chosen."""
    key, _, value = wrong.partition("=")
    if key in OTHER_BUDGETS:
        return f"did you mean +{wrong}? '~prune.budget.macs' leaves out the budget in MACs"
    if key.startswith("prune.budget."):
        return unknown_quantity(key, _number(value), list(QUANTITIES))
    if key == "prune.budget" and (
        unknown := [pair for pair in AMOUNT.findall(value) if pair[0] not in QUANTITIES]
    ):
        return unknown_quantity(f"{key}.{unknown[0][0]}", _number(unknown[0][1]), list(QUANTITIES))
    groups = [item for item in arguments.overrides if "." not in item.partition("=")[0] and item != wrong]
    groups = _first_of_sweep(groups) if arguments.sweeps else groups
    try:
        config = compose(arguments.config_name, [*path, *groups])
    except (HydraException, OmegaConfBaseException):
        config = compose(arguments.config_name)
    keys = dict(_keys(OmegaConf.to_container(config, resolve=False)))
    parent, _, child = key.rpartition(".")
    if parent in keys and keys[parent] is None:  # such as prune.amount, which has no keys by default
        return f"did you mean '{parent}={{{child}:{value}}}'?"
    names = [*keys, *_groups()]
    hint = did_you_mean(key.lstrip("+~"), names, f"{{}}={value}")
    return hint or f"To add a key that does not exist yet: +{wrong}"


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _fails(override: str, error: Exception) -> bool:
    """Whether an error is that of this override, whose key it names."""
    key = override.partition("=")[0].lstrip("+~")
    return bool(key) and f"'{key}'" in str(error)


def _keys(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all keys of a configuration, dotted, and their values."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (name := f"{path}.{key}" if path else str(key)), value
        yield from _keys(value, name)


def _groups() -> list[str]:
    """Return the names of all groups: ``net``, ``prune/criterion``, ..."""
    folders = (path for path in conf_dir().rglob("*") if path.is_dir())
    return [folder.relative_to(conf_dir()).as_posix() for folder in folders]
