"""One run from its configuration: build, train and prune, test, measure, and write the results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_prune.callbacks.checkpoints import best_weights
from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.cli.interruption import interruptible, interruption_in, undisturbed
from lightning_prune.cli.pages import page_of_training, write_safely
from lightning_prune.cli.sweep_runs import configuration_digest
from lightning_prune.cli.warning_lines import show_sentences
from lightning_prune.distillation.config import WEIGHTS
from lightning_prune.reporting.banner import Banner
from lightning_prune.reporting.epoch_log import EpochHistory, EpochLines
from lightning_prune.reporting.figure import draw_report
from lightning_prune.reporting.final_scores import scores_of_test, scores_of_validation
from lightning_prune.reporting.live_bar import LiveBar, SweepTime
from lightning_prune.reporting.model_size import compare
from lightning_prune.reporting.objective import ObjectiveCheck, objective_values
from lightning_prune.reporting.run_folder import CONFIG, NET, RECORD, REPORT, Summary, load_net, save_net
from lightning_prune.reporting.run_observer import RunObserver
from lightning_prune.reporting.trackers import describe_run, finish_trackers
from lightning_prune.serialization.integrity import fingerprint
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.tasks.module import TaskModule
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.devices import short_name
from lightning_prune.utils.hashing import json_digest
from lightning_prune.utils.modules import floating_dtype, named_shapes
from lightning_prune.utils.objectives import check_objective, objective_names
from lightning_prune.utils.terminal import say

__all__ = ["Components", "build", "run"]

EXPECTED_WARNINGS = (  # they repeat what the configuration says
    r".*does not have many workers",
    r".*number of training batches .* is smaller than the logging interval",
    r".isinstance.treespec, LeafSpec.. is deprecated",
    r"Checkpoint directory .* exists and is not empty",
    r"GPU available but not used",
    r"The dirpath has changed from",  # when a run is resumed in another folder
    r"It is recommended to use .self.log\('(lr|prune|train/)",  # the same in all processes, or that of the first
    r"Using `DistributedSampler` with the dataloaders",  # the first lines of the run say it
)
TRAIN = "train"  # value of distill.teacher: train the teacher first
TEACHER_KEYS = ("module", "data", "trainer")  # groups that a teacher depends on, besides the seed


@dataclass(frozen=True)
class Components:
    """The objects of a run."""

    module: TaskModule
    data: L.LightningDataModule
    trainer: L.Trainer
    history: EpochHistory
    observer: RunObserver
    pruning: PruningCallback | None


def build(config: DictConfig, prefix: str = "", first: Sequence[L.Callback] = ()) -> Components:
    """Instantiate all groups of a composed configuration.

    Args:
        config: composed from ``conf/``.
        prefix: printed before the line of each epoch.
        first: callbacks before all others, which show the progress.
    """
    module = instantiate(config.module, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    # With prune=none the group may still hold keys that an experiment sets, but no _target_.
    pruning = instantiate(config.prune, _convert_="all") if "_target_" in (config.prune or ()) else None
    objective = ObjectiveCheck(objective_names(config.get("objective")), _monitors(config))
    history = EpochHistory()
    loggers = [instantiate(logger) for logger in config.logger.values()]
    extra = [instantiate(callback, _convert_="all") for callback in config.callbacks.values()]
    classes = config.get("task", {}).get("class_names") or ()
    observer = RunObserver(pruning, config.get("report", True), classes)
    pruned = [pruning] if pruning else []
    callbacks = [*first, observer, objective, *pruned, *extra, EpochLines(prefix, history)]
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=[*loggers, history], _convert_="all")
    return Components(module, data, trainer, history, observer, pruning)


def _monitors(config: DictConfig) -> dict[str, str]:
    """Return the metrics that callbacks and the scheduler watch, by their keys."""
    watched = {f"callbacks.{name}.monitor": each.get("monitor") for name, each in config.callbacks.items()}
    if str((config.scheduler or {}).get("_target_", "")).endswith("ReduceLROnPlateau"):
        watched["module.monitor"] = config.module.get("monitor")
    return {str(key): name for key, name in watched.items() if isinstance(name, str)}


def run(
    config: DictConfig,
    folder: Path,
    overrides: Mapping[str, str] | None = None,
    choices: Mapping[str, str] | None = None,
    prefix: str = "",
    weights: Path | None = None,
    sweep_time: SweepTime | None = None,
    announce: bool = True,
) -> Summary:
    """Train, prune and test a network, and write all results into ``folder``.

    Args:
        config: composed from ``conf/``.
        folder: folder of the run; :mod:`lightning_prune.reporting.run_folder` lists its files.
        overrides: key -> value on the command line, for the summary.
        choices: group -> option, for the summary.
        prefix: printed before the line of each epoch, to distinguish parallel runs.
        weights: ``net.pt`` of a run whose trained network to begin with; None: begin with random weights.
        sweep_time: estimates the time until all runs of a sweep are finished.
        announce: print at the start what is trained and pruned.

    Raises:
        ValueError: ``config.objective`` names a value that the run does not have, or one of the test set.
        Interruption: Ctrl-C or SIGTERM has ended the run. What it has so far was written: its last checkpoint, and,
            of a run that trains already, record, weights, report, and a summary with the status "interrupted".
    """
    check_objective(objective_names(config.get("objective")), config.latency_runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True))
    digest = configuration_digest(config, folder)
    with interruptible():
        config = with_teacher(config)
        _prepare(config)
        first = [Banner(config, folder, prefix, choices)] if announce else []
        parts = build(config, prefix, [*first, LiveBar(prefix, sweep_time)])
        if weights is not None:
            load_net(parts.module.net, weights)
        start = time.perf_counter()
        settings = Summary(
            overrides=dict(overrides or {}),
            choices=dict(choices or {}),
            seed=config.seed,
            configuration=digest,
        )
        try:
            describe_run(parts.trainer.loggers, OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
            parts.trainer.fit(parts.module, parts.data, ckpt_path=config.ckpt_path)
            settings = replace(settings, seconds=time.perf_counter() - start, status="completed")
            if (best := best_weights(parts.trainer)) is not None:
                parts.module.load_state_dict(best)
            final = parts.trainer, parts.module, parts.data
            settings = replace(settings, val=scores_of_validation(*final))
            settings = replace(settings, **parts.observer.confusions(parts.module))
            summary = _summary(config, parts, settings, scores_of_test(*final))
            names = objective_names(config.get("objective"))
            summary = replace(summary, objective=objective_values(names, summary))
            _write(config, folder, parts, summary)
        except BaseException as error:
            if interruption_in(error) is None:
                raise
            if parts.trainer.is_global_zero:
                say(f"{prefix}ending the run, and writing record, network and report of what it has so far")
            seconds = settings.seconds or time.perf_counter() - start
            _write_interrupted(
                config, folder, parts, replace(settings, seconds=seconds, status="interrupted")
            )
            raise
        finally:
            finish_trackers(parts.trainer.loggers)
    return summary


def _write_interrupted(config: DictConfig, folder: Path, parts: Components, settings: Summary) -> None:
    """Write what a run has that was interrupted; the network only if it is the one that the record describes."""
    with undisturbed():
        config = config.copy()
        config.latency_runs = 0
        if _is_described(config, parts):
            _write(config, folder, parts, _summary(config, parts, settings, {}))
        elif parts.trainer.is_global_zero:  # within a cut; the last checkpoint is from before it
            settings.save(folder)


def _is_described(config: DictConfig, parts: Components) -> bool:
    """Return whether the record leads from the dense network to the present one, by the shapes of both."""
    dense: nn.Module = instantiate(config.net, _convert_="all")
    record = (parts.pruning.record if parts.pruning else None) or PruningRecord()
    return named_shapes(record.apply_(dense, verify=False)) == named_shapes(parts.module.net)


def _summary(config: DictConfig, parts: Components, settings: Summary, test: Mapping[str, float]) -> Summary:
    """Return ``settings`` completed by the results of a run."""
    return replace(
        settings,
        epochs=parts.trainer.current_epoch,
        steps=parts.trainer.global_step,
        test=dict(test),
        curves=parts.history.curves,
        cuts=[asdict(cut) for cut in parts.pruning.history] if parts.pruning else [],
        candidate_steps=getattr(parts.pruning, "steps", 0),
        class_names=list(parts.module.class_names),
        confusion=[] if parts.module.confusion is None else parts.module.confusion.tolist(),
        **_measured(config, parts),
    )


def dense_config(config: DictConfig) -> DictConfig:
    """Return the configuration of a teacher: without pruning, distillation, loggers and further callbacks."""
    dense = config.copy()
    dense.update({"prune": None, "distill": None, "logger": {}, "callbacks": {}, "ckpt_path": None})
    dense.objective = None
    dense.trainer.enable_checkpointing = False
    dense.latency_runs, dense.report = 0, False
    return dense


def trained_teacher(config: DictConfig) -> Path:
    """Train the dense network of a configuration, unless it was trained before, and return its ``net.pt``.

    The run is in a folder under ``config.teachers`` that is named by a digest of all keys that it depends on.
    """
    dense = dense_config(config)
    settings = {key: OmegaConf.to_container(dense[key], resolve=True) for key in TEACHER_KEYS}
    settings["seed"] = dense.seed
    name = json_digest(settings)[:12]
    folder = Path(config.teachers) / name
    if not (folder / NET).is_file():
        print(f"training the teacher, {folder}", flush=True)
        run(dense, folder, prefix="teacher │ ", announce=False)
    return folder / NET


def with_teacher(config: DictConfig) -> DictConfig:
    """Return the configuration with the file of a trained teacher, and without distillation if its weights are 0."""
    distill = config.get("distill")
    config = config.copy()
    if not distill or not any(distill.get(name) for name in WEIGHTS):
        config.distill = None
    elif distill.teacher == TRAIN:
        config.distill.teacher = str(trained_teacher(config))
    return config


def _prepare(config: DictConfig) -> None:
    show_sentences()
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if config.threads:
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, workers=True, verbose=False)


def _measured(config: DictConfig, parts: Components) -> dict[str, Any]:
    """Return the sizes of the trained network and of a newly built dense one, as arguments of a summary.

    Both are measured in the dtype of the trained one, which ``precision="bf16-true"`` and ``"64-true"`` change.
    """
    device = parts.trainer.strategy.root_device
    net = parts.module.net.to(device).eval()
    dtype = floating_dtype(net.parameters())
    dense: nn.Module = instantiate(config.net, _convert_="all").to(device, dtype).eval()
    image = parts.module.example_input_array
    assert isinstance(image, torch.Tensor)
    before, after = compare(dense, net, image[:1].to(device, dtype), config.latency_runs)
    return {
        "dense": before.sizes,
        "final": after.sizes,
        "widths": both_widths(before.widths, after.widths),
        "threads": torch.get_num_threads(),
        "device": short_name(device),
    }


def both_widths(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the filters of each layer before and after pruning; a layer that was removed has 0.

    Example:
        >>> both_widths({"conv": 8, "branch.conv": 8}, {"conv": 5})
        {'conv': (8, 5), 'branch.conv': (8, 0)}
    """
    return {name: (width, after.get(name, 0)) for name, width in before.items()}


def _write(config: DictConfig, folder: Path, parts: Components, summary: Summary) -> None:
    """Write the results, in the first of several processes only: they share the folder."""
    if not parts.trainer.is_global_zero:
        return
    record = (parts.pruning.record if parts.pruning else None) or PruningRecord(
        dense=fingerprint(parts.module.net)
    )
    record.save(folder / RECORD)
    save_net(folder / NET, parts.module.net.cpu(), record)
    summary.save(folder)
    write_safely(lambda: draw_report(summary, folder / REPORT), f"lightning-prune report {folder}")
    if config.get("report", True):
        device = parts.trainer.strategy.root_device
        page = partial(page_of_training, config, folder, parts.observer, parts.module, device)
        write_safely(page, f"lightning-prune report {folder}")
