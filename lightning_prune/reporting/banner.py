"""The first lines of a run: what is trained and pruned, on which data, on which device, and where the results go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import nn

from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.distillation.config import WEIGHTS
from lightning_prune.pruning.regular_cuts import missing_cuts
from lightning_prune.reporting.final_scores import has_test_set
from lightning_prune.trainer.lightning_internals import callbacks_of
from lightning_prune.utils.devices import short_name
from lightning_prune.utils.formatting import amounts, counted, si
from lightning_prune.utils.terminal import fitted

__all__ = ["Banner", "banner"]

#: functions of hydra.utils that name what they stand for in ``path``
LOOK_UPS = ("get_object", "get_method", "get_class")
NO_TEST_SET = "no test set: the scores at the end are those on the validation set"


class Banner(L.Callback):
    """Callback that prints the first lines of a run, in the first process only, when the data are set up.

    Args:
        config: of the run.
        folder: of the run.
        prefix: text before every line.
        choices: group -> option of the configuration.
    """

    def __init__(
        self, config: DictConfig, folder: Path, prefix: str = "", choices: Mapping[str, str] | None = None
    ) -> None:
        self.config, self.folder, self.prefix = config, folder, prefix
        self.choices = dict(choices or {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the lines, once."""
        if stage == "fit" and trainer.is_global_zero:
            for name, text in banner(self.config, self.folder, trainer, pl_module, self.choices).items():
                line = f"{self.prefix}{name:<8}{text}"
                print(fitted(line, " " * (len(self.prefix) + 8)), flush=True)


def banner(
    config: DictConfig, folder: Path, trainer: L.Trainer, module: Any, choices: Mapping[str, str]
) -> dict[str, str]:
    """Return the lines: their names, and their texts."""
    lines = {
        **(_of_trained(config, trainer, module) if _is_trained(config) else _of_new(config, trainer, module)),
        "prune": _pruning(config, choices),
        "note": "; ".join(filter(None, [_missing_cuts(trainer), _repeated_images(trainer)])),
        "distil": _distillation(config),
        "data": _data(trainer),
        "test": _test_set(trainer),
        "device": f"{_device(trainer)} · {trainer.precision}",
        "folder": _short(folder),
    }
    return {name: text for name, text in lines.items() if text}


def _of_new(config: DictConfig, trainer: L.Trainer, module: Any) -> dict[str, str]:
    what = f"{_network(module.net)} for {_length(trainer)} · {_optimizer(config)} · seed {config.seed}"
    return {"train": what}


def _of_trained(config: DictConfig, trainer: L.Trainer, module: Any) -> dict[str, str]:
    """Return the lines of a network that was trained already: the first epoch gathers statistics and cuts it."""
    after = (trainer.max_epochs or 1) - 1
    training = f"{counted(after, 'epoch')} after the cut · {_optimizer(config)}" if after else "not at all"
    return {
        "network": f"{_network(module.net)}, trained already",
        "train": f"{training} · seed {config.seed}",
    }


def _is_trained(config: DictConfig) -> bool:
    """Whether ``lightning-prune prune`` cuts the network of a run, in an epoch that trains nothing."""
    return "frozen_epoch" in (config.get("callbacks") or {})


def _network(net: nn.Module) -> str:
    return f"{type(net).__name__}, {si(sum(p.numel() for p in net.parameters()), 4, ' ')} parameters"


def _length(trainer: L.Trainer) -> str:
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    limits = [counted(epochs, "epoch")] if epochs > 0 else []
    return " or ".join([*limits, *([counted(steps, "step")] if steps > 0 else [])]) or "as long as it takes"


def _optimizer(config: DictConfig) -> str:
    name = str(config.optimizer.get("_target_", "optimizer")).rpartition(".")[2]
    return f"{name}, lr {config.optimizer.lr:g}" if "lr" in config.optimizer else name


def _pruning(config: DictConfig, choices: Mapping[str, str]) -> str:
    prune = config.get("prune") or {}
    if "_target_" not in prune:
        return "nothing: the dense network"
    method = choices.get("prune") or str(prune["_target_"]).rpartition(".")[2]
    criterion = prune.get("criterion") or {}
    by = _name(criterion) or choices.get("prune/criterion", "")
    budget = amounts(prune.get("budget") or {})
    start = prune.get("start_epoch")
    begin = "" if start is None else f", from epoch {start + 1} on"
    begin = ", at the end of a first epoch that trains nothing" if _is_trained(config) else begin
    return f"{method}{f' ({by})' if by else ''} to {budget or 'where its criterion ends'}{begin}"


def _name(config: Mapping[str, Any]) -> str:
    """Return the name of the class that a configuration builds, or of the function that it looks up.

    Example:
        >>> _name({"_target_": "lightning_prune.L2"})
        'L2'
        >>> _name({"_target_": "hydra.utils.get_object", "path": "project.criteria.closeness"})
        'closeness'
    """
    target = str(config.get("_target_") or "")
    looked_up = target.rpartition(".")[2] in LOOK_UPS and config.get("path")
    return str(looked_up or target).rpartition(".")[2]


def _missing_cuts(trainer: L.Trainer) -> str:
    callbacks = [each for each in callbacks_of(trainer) if isinstance(each, FilterPruningCallback)]
    return "; ".join(missing_cuts(each.policy, each.timing, trainer.max_epochs or -1) for each in callbacks)


def _distillation(config: DictConfig) -> str:
    distill = config.get("distill") or {}
    losses = [f"{name.rstrip('_')} {distill[name]:g}" for name in WEIGHTS if distill.get(name)]
    return f"{', '.join(losses)}, teacher: {_short(Path(str(distill['teacher'])))}" if losses else ""


def _data(trainer: L.Trainer) -> str:
    """Return the name of the data module; the batches are known only when training begins."""
    data = _datamodule(trainer)
    if data is None:
        return ""
    splits = ((name, _length_of(data, name)) for name in ("train", "val", "test"))
    counts = ", ".join(f"{count} {name}" for name, count in splits if count is not None)
    size = getattr(data, "batch_size", None)
    parts = [type(data).__name__, counts and f"{counts} images", size and f"batches of {size}"]
    return " · ".join(filter(None, parts))


def _datamodule(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _test_set(trainer: L.Trainer) -> str:
    data = _datamodule(trainer)
    return "" if data is None or has_test_set(data) else NO_TEST_SET


def _repeated_images(trainer: L.Trainer) -> str:
    """Return which scores are inexact: each process gets as many images, so that some images are counted twice."""
    data, processes = _datamodule(trainer), trainer.world_size
    counts = {name: _length_of(data, name) or 0 for name in ("val", "test")}
    uneven = [f"{count} {name}" for name, count in counts.items() if count % processes]
    if not uneven:
        return ""
    return f"{' and '.join(uneven)} images on {processes} processes: scores count some of them twice"


def _length_of(data: Any, stage: str) -> int | None:
    """Return the number of samples of a split; None if the data module does not say it without loading them."""
    samples = getattr(data, "samples", None)
    try:
        return len(samples(stage)) if callable(samples) else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = short_name(device)
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return f"{count}{name}" + (
        f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    )


def _short(path: Path) -> str:
    """Return a path relative to the present folder if it lies within."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)
