"""Code that loads the network of a run, for people to copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_prune.reporting.run_folder import CONFIG, NET

__all__ = ["load_code"]

LINE = 88  # characters


def load_code(net: Mapping[str, Any], folder: Path) -> str:
    """Return Python code that builds the network of a configuration and loads the weights of a run.

    Args:
        net: the group ``net`` of the configuration.
        folder: of the run.

    Example:
        >>> print(load_code({"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}, Path("run")))
        from lightning_prune import load_pruned
        from torch.nn import Linear
        <BLANKLINE>
        net = Linear(in_features=4, out_features=2)
        net = load_pruned(net, "run/net.pt").eval()
    """
    target = str(net.get("_target_", ""))
    path = (folder / NET).as_posix()
    load = f'net = load_pruned(net, "{path}").eval()'
    module, _, name = target.rpartition(".")
    if not module or not _is_plain(net):
        return _by_configuration(folder, load)
    arguments = [f"{key}={value!r}" for key, value in net.items() if not key.startswith("_")]
    imports = sorted(["from lightning_prune import load_pruned", f"from {module} import {name}"])
    return "\n".join([*imports, "", *_call(name, arguments), load])


def _is_plain(net: Mapping[str, Any]) -> bool:
    """Return whether the arguments are values that stand in code as they are: no objects, no flags of Hydra."""
    flags = {key for key in net if str(key).startswith("_")} - {"_target_"}
    return not flags and not any(_has_target(value) for value in net.values())


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _call(name: str, arguments: list[str]) -> list[str]:
    one = f"net = {name}({', '.join(arguments)})"
    if len(one) <= LINE:
        return [one]
    return [f"net = {name}(", *(f"    {argument}," for argument in arguments), ")"]


def _by_configuration(folder: Path, load: str) -> str:
    config = (folder / CONFIG).as_posix()
    return "\n".join(
        [
            "from hydra.utils import instantiate",
            "from lightning_prune import load_pruned",
            "from omegaconf import OmegaConf",
            "",
            f'net = instantiate(OmegaConf.load("{config}").net, _convert_="all")',
            load,
        ]
    )
