"""Values of a composed configuration, checked before torch is imported: types, ranges, names, files.

Types are those of the constructors that the configuration names, read from their source.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.cli.source_signatures import Module, Parameter, Signature, signature_of
from lightning_prune.cli.value_types import accepts, choices, expected, kind
from lightning_prune.utils.hints import did_you_mean

__all__ = ["BOUNDS", "problems"]

#: keys that no constructor takes, or takes unannotated -> annotation
ANNOTATIONS = {
    "seed": "int",
    "threads": "int | None",
    "latency_runs": "int",
    "report": "bool",
    "table": "bool",
    "teachers": "str",
    "objective": "str | Sequence[str] | None",
    "ckpt_path": "str | None",
    "task.in_channels": "int",
    "task.num_classes": "int",
    "task.height": "int",
    "task.width": "int",
    "task.ignore_index": "int | None",
    "task.class_names": "list | None",
    "task.score": "str",
    "callbacks.stopping.patience": "int",
    "callbacks.stopping.min_delta": "float",
}
#: key -> lowest and highest value that any constructor of the group accepts
BOUNDS: Mapping[str, tuple[float, float]] = {
    "threads": (1, math.inf),
    "latency_runs": (0, math.inf),
    "task.in_channels": (1, math.inf),
    "task.num_classes": (1, math.inf),
    "task.height": (1, math.inf),
    "task.width": (1, math.inf),
    "data.batch_size": (1, math.inf),
    "data.num_workers": (0, math.inf),
    "data.val": (0, math.inf),
    "data.test": (0, math.inf),
    "optimizer.lr": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "trainer.max_epochs": (-1, math.inf),
    "prune.every_n_epochs": (1, math.inf),
    "prune.every_n_steps": (1, math.inf),
    "prune.start_epoch": (0, math.inf),
    "prune.channel_multiple": (1, math.inf),
    "prune.criterion.omega": (0, 1),
    "prune.limits.layers": (0, 1),
}
REFERENCE = re.compile(r"\$\{[\w.]+\}")
QUANTITIES = ("macs", "params", "activations")
WORDS = ("last", "best", "hpc", "registry")  # checkpoints that Lightning looks for itself
NO_CHECKPOINT = "a run writes checkpoints/last.ckpt into its folder"


def problems(config: DictConfig, ranges: bool = True) -> list[str]:
    """Return what is wrong with the values of a configuration, a sentence each, with the nearest that is right.

    Args:
        config: composed.
        ranges: whether numbers of the right kind may be too small or too large.
    """
    wrong = dict[str, str]()
    for key, parameter, value in _checked(config):
        if not accepts(parameter, value):
            wrong.setdefault(key, _sentence(key, parameter, value))
    for key, bounds in BOUNDS.items() if ranges else ():
        wrong.update(_out_of_range(config, key, bounds) if key not in wrong else {})
    return [*wrong.values(), *_unknown_arguments(config), *_budget(config), *_missing_files(config)]


def _sentence(key: str, parameter: Parameter, value: Any) -> str:
    hint = did_you_mean(str(value), choices(parameter), f"{key}={{}}") or _number_hint(key, parameter, value)
    return f"{key} is {kind(value)}, and must be {expected(parameter)}{'; ' if hint else ''}{hint}"


def _number_hint(key: str, parameter: Parameter, value: Any) -> str:
    """Return the number that is probably meant by ``0,5`` or ``1e3``, or the text that looks like a number."""
    if isinstance(value, (int, float)) and accepts(parameter, str(value)):  # a folder with the name 2024
        return f"""did you mean {key}="'{value}'"?"""
    if isinstance(value, float) and value.is_integer():
        return f"did you mean {key}={int(value)}?" if accepts(parameter, int(value)) else ""
    text = str(value).replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        return ""
    return f"did you mean {key}={text}?" if accepts(parameter, number) else ""


def _checked(config: DictConfig) -> Iterator[tuple[str, Parameter, Any]]:
    """Yield all keys with an annotation, and their values; a reference is yielded under the key it refers to."""
    empty = Module("", False, ())
    for key, annotation in ANNOTATIONS.items():
        if (value := _value(config, key)) is not Ellipsis:
            yield key, Parameter(ast.parse(annotation, mode="eval").body, None, empty), value
    for path, signature, arguments in _built(config):
        for name, raw in arguments.items():
            reference = REFERENCE.fullmatch(raw) if isinstance(raw, str) else None
            is_mixed = reference is None and "${" in str(raw)  # what these refer to is checked itself
            value = Ellipsis if is_mixed else _value(config, f"{path}.{name}")
            if name in signature.parameters and value is not Ellipsis:
                yield reference[0][2:-1] if reference else f"{path}.{name}", signature.parameters[name], value


def _built(config: DictConfig) -> Iterator[tuple[str, Signature, dict[str, Any]]]:
    """Yield the nodes that a constructor builds: path, signature, and arguments with unresolved references."""
    nodes = OmegaConf.to_container(config, resolve=False)
    assert isinstance(nodes, dict)
    nodes.pop("hydra", None)
    for path, node in _targets(nodes):
        signature = signature_of(str(node["_target_"]))
        if signature is not None:
            yield path, signature, {str(k): v for k, v in node.items() if not str(k).startswith("_")}


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, child in node.items():
            yield from _targets(child, f"{path}.{key}" if path else str(key))


def _value(config: DictConfig, key: str) -> Any:
    """Return a value with its references resolved; ``...`` if there is none, or it depends on the run."""
    try:
        value = OmegaConf.select(config, key, default=Ellipsis)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, ValueError):
        return Ellipsis


def _out_of_range(config: DictConfig, key: str, bounds: tuple[float, float]) -> dict[str, str]:
    value = _value(config, key)
    lowest, highest = bounds
    if isinstance(value, bool) or not isinstance(value, (int, float)) or lowest <= value <= highest:
        return {}
    allowed = f"at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
    return {key: f"{key} is {value}, and must be {allowed}"}


def _unknown_arguments(config: DictConfig) -> Iterator[str]:
    for path, signature, arguments in _built(config):
        for name in arguments.keys() - signature.parameters.keys() if not signature.is_open else ():
            target = OmegaConf.select(config, f"{path}._target_")
            hint = did_you_mean(name, signature.parameters, f"{path}.{{}}")
            yield f"{path}.{name}: {target} has no argument {name!r}{'; ' if hint else ''}{hint}"


def _budget(config: DictConfig) -> Iterator[str]:
    known = [*QUANTITIES, *(_value(config, "prune.resources") or {} if config.get("prune") else {})]
    for argument in ("budget", "amount") if config.get("prune") else ():
        amounts = _value(config, f"prune.{argument}")
        for name, value in amounts.items() if isinstance(amounts, dict) else ():
            key = f"prune.{argument}.{name}"
            if name not in known:
                yield unknown_quantity(key, value, known)
            elif isinstance(value, (int, float)) and not value > 0:
                yield f"{key} is {value}, and must be a share from 0 to 1, or an amount above 1"


def unknown_quantity(key: str, value: Any, known: list[str]) -> str:
    """Return the message for a budget of something that is not counted: what is counted, and what may be meant.

    Example:
        >>> unknown_quantity("prune.budget.maks", 0.5, ["macs", "params"])
        'prune.budget.maks: a budget is of macs or params; did you mean prune.budget.macs=0.5?'
    """
    parent, _, name = key.rpartition(".")
    if name.startswith(("latency", "time")) and "latency" not in known:
        amount = value * 1e6 if name.endswith("_ms") and isinstance(value, (int, float)) else value
        amount = int(amount) if isinstance(amount, float) and amount.is_integer() and amount > 1 else amount
        hint = f"for time, in nanoseconds: +prune/resources=latency +{parent}.latency={amount}"
        hint += " '~prune.budget.macs'" if parent.endswith("budget") else ""
    elif "flop" in name.lower():
        hint = f"did you mean {parent}.macs={value}? One MAC is two FLOPs, and the share is the same"
    else:
        hint = did_you_mean(name, known, f"{parent}.{{}}={value}")
        hint = hint if "macs" in hint else hint.replace("prune.", "+prune.", 1)  # not there by default
    return f"{key}: a budget is of {', '.join(known[:-1])} or {known[-1]}{'; ' if hint else ''}{hint}"


def _missing_files(config: DictConfig) -> Iterator[str]:
    checkpoint, root = _value(config, "ckpt_path"), _value(config, "data.root")
    is_word = str(checkpoint).split(":")[0] in WORDS or "://" in str(checkpoint)
    if isinstance(checkpoint, str) and not is_word and not Path(checkpoint).exists():
        yield f"ckpt_path: there is no file {checkpoint}; {NO_CHECKPOINT}"
    is_own = str(_value(config, "data._target_")).startswith("lightning_prune.data.")  # others may download
    downloads = _value(config, "data.download") is True
    if isinstance(root, str) and is_own and not downloads and not Path(root).expanduser().is_dir():
        yield f"data.root: there is no folder {Path(root).expanduser().absolute()}"
