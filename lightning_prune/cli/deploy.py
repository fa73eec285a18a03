"""Networks of finished runs for other programs: INT8 with its comparison, and folders for the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_prune.cli.config import load_config
from lightning_prune.reporting.comparison import comparison, single, threads_or_device
from lightning_prune.reporting.deployed import Deployed, deployed_table, measured, test_scores
from lightning_prune.reporting.run_folder import NET, SUMMARY, Summary, load_net
from lightning_prune.serialization.export import export
from lightning_prune.serialization.factories import TARGET
from lightning_prune.serialization.model_card import ModelCard
from lightning_prune.serialization.pretrained import save_pretrained
from lightning_prune.serialization.quantization import Int8Export, export_int8
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import read_network
from lightning_prune.trainer.training_inputs import training_inputs
from lightning_prune.utils.formatting import amounts, counted
from lightning_prune.utils.tables import Table
from lightning_prune.utils.terminal import say

__all__ = ["Comparison", "LoadedRun", "int8_comparison", "load_run", "write_folder"]

RUNS = 40  # measured runs of each network
ONNX_FILE, INT8_FILE = "model.onnx", "model.int8.onnx"


@dataclass(frozen=True)
class LoadedRun:
    """The network of a run.

    Attributes:
        folder: of the run.
        config: of the run.
        net: the trained network, pruned as the record says.
        record: what was removed; None if nothing was.
        shape: of the example input.
    """

    folder: Path
    config: DictConfig
    net: nn.Module
    record: PruningRecord | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """A dense network, the pruned one, and the pruned one in INT8, all in ONNX.

    Attributes:
        networks: name -> size, latency and score.
        int8: what was quantised.
        threads: of ONNX Runtime in the measurement.
    """

    networks: dict[str, Deployed]
    int8: Int8Export
    threads: int

    def table(self) -> Table:
        """Return the table for people."""
        return deployed_table(self.networks, self.threads)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        networks = {name: asdict(each) for name, each in self.networks.items()}
        return {"networks": networks, "int8": asdict(self.int8), "threads": self.threads}


def load_run(folder: Path, weights: Path | None = None, shape: Sequence[int] = ()) -> LoadedRun:
    """Build the network of a run and load its weights.

    Args:
        folder: of the run.
        weights: a checkpoint or safetensors file of the run; None: its ``net.pt``.
        shape: of the input; empty: that of the run's configuration.

    Raises:
        FileNotFoundError: the folder holds no run, or no weights.
        RecordError: the weights are damaged, or of another network.
    """
    say(f"loading the network of {folder}")
    config, source = load_config(folder), weights or folder / NET
    if not source.is_file():
        last = folder / "checkpoints" / "last.ckpt"
        advice = f"--weights {last}" if last.is_file() else "a run that has ended"
        raise FileNotFoundError(f"there is no {source}, the run has not ended: give {advice}")
    net = load_net(instantiate(config.net, _convert_="all"), source).eval()
    return LoadedRun(
        folder, config, net, read_network(source).record, tuple(shape or config.module.example_input_shape)
    )


def int8_comparison(
    run: LoadedRun,
    path: Path,
    *,
    baseline: Path | None = None,
    images: int = 64,
    threads: int = 1,
    dynamic_batch: bool = True,
    reduce_range: bool = False,
) -> Comparison:
    """Write the network of a run in INT8, and compare it with the pruned and with the dense network in ONNX.

    Args:
        run: the run; its training images without augmentation calibrate, its test images score.
        path: of the network in INT8; ends in ``.onnx``.
        baseline: folder of a dense run, which gives the dense network its weights and score; None: no score.
        images: number of calibration images.
        threads: of ONNX Runtime.
        dynamic_batch: whether the batch may vary.
        reduce_range: see :func:`~lightning_prune.export_int8`.

    Raises:
        ValueError: the data of the run cannot be read.
        ExportError: no operator can be quantised.
    """
    say(f"reading {images} training images to calibrate with")
    data = _data(run)
    try:
        examples = training_inputs(data, run.net, images)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"INT8 needs training images, and those of {run.folder} cannot be read: {error}"
        ) from error
    say("quantising to INT8")
    int8 = export_int8(
        run.net, path, examples, run.record, dynamic_batch=dynamic_batch, reduce_range=reduce_range
    )
    dense = _dense(run, baseline)
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            "dense": Path(folder, "dense.onnx"),
            "pruned": Path(folder, "pruned.onnx"),
            "pruned INT8": path,
        }
        example = torch.zeros(run.shape)
        say("writing the dense and the pruned network as ONNX, to compare with")
        export(dense, example, paths["dense"], dynamic_batch=dynamic_batch)
        export(run.net, example, paths["pruned"], run.record, dynamic_batch=dynamic_batch)
        say(f"measuring the latency of {counted(len(paths), 'network')}, {RUNS} runs each")
        networks = measured(paths, run.shape, threads, RUNS)
        tested = [name for name in paths if name != "dense" or baseline]
        scores = {name: _scores(run, paths[name]) for name in tested}
    completed = {
        name: Deployed(each.bytes, each.latency_ms, scores.get(name, {})) for name, each in networks.items()
    }
    return Comparison(completed, int8, threads)


def _data(run: LoadedRun) -> Any:
    if run.config.get("data") is None or not run.config.data.get(TARGET):
        raise ValueError(f"INT8 needs training images, and the configuration of {run.folder} names no data")
    return instantiate(run.config.data, _convert_="all")


def _dense(run: LoadedRun, baseline: Path | None) -> nn.Module:
    """Return the dense network, with the weights of the baseline or with random ones."""
    if baseline is None:
        dense: nn.Module = instantiate(run.config.net, _convert_="all").eval()
        return dense
    loaded = load_run(baseline)
    if loaded.record:
        raise ValueError(f"{baseline} is pruned: --baseline takes the run of the dense network (prune=none)")
    return loaded.net


def _scores(run: LoadedRun, path: Path) -> dict[str, float]:
    say(f"testing {path.name} on the test set")
    config = run.config.copy()
    config.module.distillation = None
    return test_scores(instantiate(config.module, _convert_="all"), _data(run), path)


def write_folder(
    run: LoadedRun,
    folder: Path,
    *,
    name: str = "",
    license: str = "unknown",
    compared: Comparison | None = None,
) -> Path:
    """Write weights, record, configuration, model card and ONNX file of a run's network into a folder.

    Args:
        run: the run.
        folder: to write into.
        name: of the model; empty: that of the folder.
        license: for the model card.
        compared: figures for the model card, of :func:`int8_comparison`; None: those of the run.
    """
    summary = Summary.load(run.folder) if (run.folder / SUMMARY).is_file() else Summary()
    factory: Any = OmegaConf.to_container(run.config.net, resolve=True)
    say(f"writing {folder / ONNX_FILE}")
    export(run.net, torch.zeros(run.shape), folder / ONNX_FILE, run.record)
    say("writing weights, record and model card")
    tables = [compared.table().markdown()] if compared else _tables(summary)
    card = ModelCard(
        name=name or folder.resolve().name,
        license=license,
        task=_task(run.config),
        data=str(run.config.data.get(TARGET, "")).rpartition(".")[2],
        scores=summary.test,
        class_names=summary.class_names or list(run.config.task.get("class_names") or ()),
        input_shape=run.shape,
        macs=summary.final.macs / summary.dense.macs if summary.final and summary.dense else None,
        tables=[*tables, *([f"{compared.int8}."] if compared else [])],
        training=_training(run.config, summary),
    )
    return save_pretrained(run.net, folder, run.record or PruningRecord(), factory=factory, card=card)


def _task(config: DictConfig) -> str:
    target = str(config.module.get(TARGET, ""))
    return next((task for task in ("segmentation", "classification") if f".{task}." in target), "")


def _tables(summary: Summary) -> list[str]:
    """Return the table of the run's results, if it has some."""
    if summary.dense is None or summary.final is None:
        return []
    where, (stage, scores) = threads_or_device(summary.threads, summary.device or "cpu"), summary.scores
    if summary.pruned:
        return [comparison(summary.dense, summary.final, {}, scores, where, stage).markdown()]
    return [single(summary.final, scores, where, stage).markdown()]


def _training(config: DictConfig, summary: Summary) -> list[str]:
    """Return sentences about the training."""
    sentences = [f"{counted(summary.epochs, 'epoch')}, seed {summary.seed}."] if summary.epochs else []
    prune: Mapping[str, Any] = config.get("prune") or {}
    if budget := prune.get("budget"):
        goals = amounts({key: value for key, value in budget.items() if isinstance(value, (int, float))})
        method = str(prune.get(TARGET, "")).rpartition(".")[2]
        sentences.append(
            f"Pruned in training by {method} to {goals}, in {counted(len(summary.cuts), 'cut')}."
        )
    return sentences
