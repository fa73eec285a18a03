"""``lightning-prune export``: write the pruned network of a run as ONNX, INT8, ``torch.export`` program or folder."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.errors import InstantiationException

from lightning_prune.cli.config import EXPECTED_ERRORS, root_cause
from lightning_prune.cli.deploy import (
    INT8_FILE,
    Comparison,
    LoadedRun,
    int8_comparison,
    load_run,
    write_folder,
)
from lightning_prune.cli.parsers import read
from lightning_prune.cli.train import EXPECTED_WARNINGS
from lightning_prune.serialization.export import export
from lightning_prune.serialization.factories import is_known
from lightning_prune.serialization.hub import push_pretrained
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.tables import show
from lightning_prune.utils.terminal import say

__all__ = ["export_run", "main"]

FILES = (".onnx", ".pt2")


def export_run(
    folder: Path,
    path: Path,
    weights: Path | None = None,
    dynamic_batch: bool = True,
    shape: Sequence[int] = (),
) -> float:
    """Build the network of a run, load its weights, and export it; see :func:`lightning_prune.export`.

    Args:
        folder: folder of the run.
        path: the file to write; ends in ``.onnx`` or ``.pt2``.
        weights: a checkpoint or safetensors file of the run; None: its ``net.pt``.
        dynamic_batch: whether the exported network accepts any number of samples.
        shape: shape of the input; empty: that of the run's configuration.

    Returns:
        The largest difference of the outputs from those in PyTorch, relative to the largest output.
    """
    run = load_run(folder, weights, shape)
    say(f"writing {path}, and comparing its outputs with those in PyTorch")
    return export(run.net, torch.zeros(run.shape), path, run.record, dynamic_batch=dynamic_batch)


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("export", arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    try:
        _export(options)
    except (*EXPECTED_ERRORS, RuntimeError) as error:
        reason = root_cause(error) if isinstance(error, InstantiationException) else error
        raise SystemExit(f"lightning-prune export: {reason}") from error


def _export(options: argparse.Namespace) -> None:
    path: Path = options.path or options.run / _default(options)
    if path.suffix[1:].isalpha() and path.suffix not in FILES and not path.is_dir():
        raise ValueError(f"{path} must end in {' or '.join(FILES)}, or be a folder")
    if options.push or (path.suffix not in FILES and not path.is_file()):
        _export_folder(options, path)
    elif options.int8:
        run = load_run(options.run, options.weights, options.shape)
        _report(_compared(run, path, options), path, options.json)
    else:
        difference = export_run(options.run, path, options.weights, not options.fixed_batch, options.shape)
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, with the pruning record; outputs within "
            f"{difference:.1g} of those in PyTorch"
        )


def _default(options: argparse.Namespace) -> str:
    return "pretrained" if options.push else "net.int8.onnx" if options.int8 else "net.onnx"


def _export_folder(options: argparse.Namespace, path: Path) -> None:
    """Write a folder in the shape of the hub, and upload it if that was asked for."""
    run = load_run(options.run, options.weights, options.shape)
    compared = _compared(run, path / INT8_FILE, options) if options.int8 else None
    name = (options.push or "").rpartition("/")[2]
    write_folder(run, path, name=name, license=options.license, compared=compared)
    if compared:
        _report(compared, path / INT8_FILE, options.json)
    known = is_known(json.loads((path / "config.json").read_text()).get("factory"))
    how = f"load_pretrained({str(path)!r})" if known else f"load_pruned(dense_network, {str(path)!r})"
    print(f"{path}: weights, record, config.json, ONNX and model card; {how} loads it")
    if options.push:
        say(f"uploading to {options.push}")
        address = push_pretrained(path, options.push, private=not options.public)
        print(f"uploaded to {address}")


def _compared(run: LoadedRun, path: Path, options: argparse.Namespace) -> Comparison:
    return int8_comparison(
        run,
        path,
        baseline=options.baseline,
        images=options.images,
        threads=options.threads,
        dynamic_batch=not options.fixed_batch,
        reduce_range=options.reduce_range,
    )


def _report(compared: Comparison, path: Path, json_path: Path | None) -> None:
    """Print the comparison as a table, or as JSON, or write it."""
    text = json.dumps(compared.as_dict(), indent=1)
    if json_path == Path("-"):
        print(text)
        return
    if json_path:
        write_text(json_path, text + "\n")
    show(compared.table())
    print(f"{path}: {compared.int8}")
