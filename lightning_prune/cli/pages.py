"""Write the pages of runs: at the end of a training, and again for folders of finished runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from lightning_prune.cli.config import load_config, root_cause
from lightning_prune.latency.profiler import BackendSettings
from lightning_prune.reporting.examples import EXAMPLES, Examples, NoExamples, choose, predict
from lightning_prune.reporting.layers import LAYERS, layers_of, save_layers
from lightning_prune.reporting.pages.run_files import RunFiles, read_run
from lightning_prune.reporting.pages.run_page import write_run_page
from lightning_prune.reporting.run_folder import NET, RECORD, load_net
from lightning_prune.reporting.run_observer import RunObserver
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.modules import floating_dtype

__all__ = ["complete_run", "page_of_training", "write_safely"]


def page_of_training(
    config: DictConfig,
    folder: Path,
    observer: RunObserver,
    module: L.LightningModule,
    device: torch.device,
) -> Path:
    """Write ``layers.json``, ``examples.npz`` and ``report.html`` of a training that has ended.

    Args:
        config: of the run.
        folder: of the run, whose other files are written already.
        observer: of the training.
        module: with the trained network.
        device: of the training, on which the layers are timed unless ``config.latency_runs`` is 0.
    """
    reason = ""
    timing = BackendSettings("eager", device, torch.get_num_threads()) if config.latency_runs else None
    _write_layers(config, folder, floating_dtype(module.parameters()), timing)
    try:
        observer.finish(module).save(folder)
    except NoExamples as error:
        reason = str(error)
    return write_run_page(_with_reason(read_run(folder), reason))


def _with_reason(run: RunFiles, reason: str) -> RunFiles:
    return replace(run, why_no_examples=reason or run.why_no_examples)


def _write_layers(
    config: DictConfig, folder: Path, dtype: torch.dtype | None = None, timing: BackendSettings | None = None
) -> None:
    record = PruningRecord.load(folder / RECORD)
    dense: nn.Module = instantiate(config.net, _convert_="all").to(dtype)
    image = torch.zeros((1, *config.module.example_input_shape[1:]), dtype=dtype)
    save_layers(layers_of(dense, record, image, timing), folder)


def write_safely(write: Callable[[], object], again: str) -> None:
    """Call a function that writes a page; an error is one warning, since the results that it shows are complete.

    Args:
        write: the function.
        again: the command that writes the page.
    """
    try:
        write()
    except Exception as error:  # whatever it is, a training of days must not end with it
        warnings.warn(
            f"no page was written: {root_cause(error)}; the results are complete. Try: {again}", stacklevel=2
        )


def complete_run(folder: Path) -> RunFiles:
    """Read a run; make ``layers.json`` and ``examples.npz`` if it has none, from its configuration and its data.

    What cannot be made, since the data are elsewhere or the network is of code that is not there, is noted.
    """
    run = read_run(folder)
    if not run.has_net or not (folder / RECORD).is_file() or not run.config:
        return run
    config, reason = None, ""
    try:
        config = load_config(folder)
        if not (folder / LAYERS).is_file():
            _write_layers(config, folder)
        if not (folder / EXAMPLES).is_file():
            _examples_of(config, folder).save(folder)
    except Exception as error:  # networks and data of others raise anything
        reason = root_cause(error)
    return _with_reason(read_run(folder), reason)


def _examples_of(config: DictConfig, folder: Path) -> Examples:
    """Return images of the validation data of a run with the outputs of its network."""
    data = instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    samples = getattr(data.val_dataloader(), "dataset", None)
    net = load_net(instantiate(config.net, _convert_="all"), folder / NET)
    classes = list(config.get("task", {}).get("class_names") or ())
    return predict(net, samples, choose(samples), "final", classes)
