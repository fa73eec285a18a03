"""One run from its configuration: build, train and prune, test, measure, write down (level 5)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_prune.callbacks.checkpoints import best_weights
from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.reporting import run_folder as runs
from lightning_prune.reporting.epoch_log import EpochHistory, EpochLines
from lightning_prune.reporting.figure import draw_report
from lightning_prune.reporting.model_size import compare
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.segmentation.module import SegmentationModule
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import load_pruned
from lightning_prune.utils.hashing import json_digest

__all__ = ["Components", "build", "run"]

EXPECTED_WARNINGS = (  # none of them is news to somebody who chose the configuration
    r".*does not have many workers",
    r".*number of training batches .* is smaller than the logging interval",
    r".isinstance.treespec, LeafSpec.. is deprecated",
    r"Checkpoint directory .* exists and is not empty",
    r"GPU available but not used",
    r"The dirpath has changed from",  # of a run that goes on in a folder of its own
)
TRAIN = "train"
MADE_BY = ("module", "data", "trainer")  # what a teacher depends on, with the seed


@dataclass(frozen=True)
class Components:
    """What a configuration builds."""

    module: SegmentationModule
    data: L.LightningDataModule
    trainer: L.Trainer
    history: EpochHistory
    pruning: FilterPruningCallback | None


def build(config: DictConfig, prefix: str = "") -> Components:
    """Instantiate every group of a composed configuration; ``prefix`` comes before the line of each epoch."""
    module = instantiate(config.module, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    # An experiment may set keys of a callback that prune=none then takes away.
    pruning = instantiate(config.prune, _convert_="all") if "_target_" in (config.prune or ()) else None
    history = EpochHistory()
    loggers = [instantiate(logger) for logger in config.logger.values()]
    extra = [instantiate(callback, _convert_="all") for callback in config.callbacks.values()]
    callbacks = [*([pruning] if pruning else []), *extra, EpochLines(prefix)]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=[*loggers, history], _convert_="all")
    return Components(module, data, trainer, history, pruning)


def run(
    config: DictConfig,
    folder: Path,
    overrides: Mapping[str, str] | None = None,
    choices: Mapping[str, str] | None = None,
    prefix: str = "",
    weights: Path | None = None,
) -> Summary:
    """Train, prune and test as ``config`` says, and write everything into ``folder``.

    Args:
        config: as composed from ``conf/``.
        folder: of the run; see :mod:`lightning_prune.reporting.run_folder` for what is in it afterwards.
        overrides: as given on the command line, for the summary.
        choices: option of each group, for the summary.
        prefix: before the line of each epoch, to tell parallel runs apart.
        weights: of a trained network to begin with, a run's ``net.pt``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / runs.CONFIG, resolve=True)
    config = _with_teacher(config)
    _prepare(config)
    parts = build(config, prefix)
    if weights is not None:
        load_pruned(parts.module.net, weights)
    start = time.perf_counter()
    parts.trainer.fit(parts.module, parts.data, ckpt_path=config.ckpt_path)
    seconds = time.perf_counter() - start
    if (best := best_weights(parts.trainer)) is not None:
        parts.module.load_state_dict(best)
    (test,) = parts.trainer.test(parts.module, parts.data, verbose=False)
    summary = _summary(config, parts, seconds, test, overrides or {}, choices or {})
    _write(folder, parts, summary)
    return summary


def _summary(
    config: DictConfig,
    parts: Components,
    seconds: float,
    test: Mapping[str, float],
    overrides: Mapping[str, str],
    choices: Mapping[str, str],
) -> Summary:
    return Summary(
        status="completed",
        overrides=dict(overrides),
        choices=dict(choices),
        seed=config.seed,
        epochs=parts.trainer.current_epoch,
        steps=parts.trainer.global_step,
        seconds=seconds,
        test={name.removeprefix("test/"): float(value) for name, value in test.items()},
        curves=parts.history.curves,
        cuts=[asdict(cut) for cut in parts.pruning.history] if parts.pruning else [],
        candidate_steps=getattr(parts.pruning, "steps", 0),
        **_measured(config, parts),
    )


def dense_config(config: DictConfig) -> DictConfig:
    """The same run without pruning, distillation, loggers and further callbacks: how a teacher is trained."""
    dense = config.copy()
    dense.update({"prune": None, "distill": None, "logger": {}, "callbacks": {}, "ckpt_path": None})
    dense.latency_runs = 0
    return dense


def trained_teacher(config: DictConfig) -> Path:
    """The dense network of a configuration, trained to its end: once, whoever asks again gets the same file.

    It lies under ``config.teachers``, in a folder that is named by everything that made it.
    """
    dense = dense_config(config)
    made_by = {key: OmegaConf.to_container(dense[key], resolve=True) for key in MADE_BY} | {
        "seed": dense.seed
    }
    name = json_digest(made_by)[:12]
    folder = Path(config.teachers) / name
    if not (folder / runs.NET).is_file():
        print(f"training the teacher, {folder}", flush=True)
        run(dense, folder, prefix="teacher │ ")
    return folder / runs.NET


def _with_teacher(config: DictConfig) -> DictConfig:
    """Train the teacher if one is asked for; none where all weights are 0."""
    told = config.get("distill")
    config = config.copy()
    if not told or not any(told[name] for name in ("alpha", "beta", "lambda_")):
        config.distill = None
    elif told.teacher == TRAIN:
        config.distill.teacher = str(trained_teacher(config))
    return config


def _prepare(config: DictConfig) -> None:
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if config.threads:
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)


def _measured(config: DictConfig, parts: Components) -> dict[str, Any]:
    """What the network cost before and after. The dense one is built anew: its weights do not matter."""
    device = parts.trainer.strategy.root_device
    dense: nn.Module = instantiate(config.net, _convert_="all").to(device).eval()
    net = parts.module.net.to(device).eval()
    image = parts.module.example_input_array
    assert isinstance(image, torch.Tensor)
    before, after = compare(dense, net, image[:1].to(device), config.latency_runs)
    return {
        "dense": before.sizes,
        "final": after.sizes,
        "widths": both_widths(before.widths, after.widths),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def both_widths(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Filters of each layer before and after; one that has vanished has none left.

    Example:
        >>> both_widths({"conv": 8, "branch.conv": 8}, {"conv": 5})
        {'conv': (8, 5), 'branch.conv': (8, 0)}
    """
    return {name: (width, after.get(name, 0)) for name, width in before.items()}


def _write(folder: Path, parts: Components, summary: Summary) -> None:
    record = (parts.pruning.record if parts.pruning else None) or PruningRecord()
    record.save(folder / runs.RECORD)
    runs.save_net(folder / runs.NET, parts.module.net.cpu(), record)
    summary.save(folder)
    draw_report(summary, folder / runs.REPORT)
