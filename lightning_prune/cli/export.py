"""``lightning-prune export``: a run's pruned network as ONNX or ``torch.export`` program (level 5)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_prune.reporting import run_folder as runs
from lightning_prune.serialization.export import export
from lightning_prune.serialization.saving import load_pruned, read_network

__all__ = ["export_run", "main"]


def export_run(
    folder: Path,
    path: Path,
    weights: Path | None = None,
    dynamic_batch: bool = True,
    shape: Sequence[int] = (),
) -> float:
    """Build the network of a run, load its weights, and export it; see :func:`lightning_prune.serialization.export.export`.

    Args:
        folder: of the run.
        path: to write; ends in ``.onnx`` or ``.pt2``.
        weights: ``net.pt`` of the run if None; a checkpoint or safetensors file of it otherwise.
        dynamic_batch: whether the number of samples may vary.
        shape: of the input, if it is not that of the run's configuration.
    """
    config, source = OmegaConf.load(folder / runs.CONFIG), weights or folder / runs.NET
    net = load_pruned(instantiate(config.net, _convert_="all"), source)
    example = torch.zeros(tuple(shape or config.module.example_input_shape))
    return export(net, example, path, read_network(source).record, dynamic_batch=dynamic_batch)


def main(arguments: Sequence[str]) -> None:
    """The command; see its ``--help``."""
    parser = argparse.ArgumentParser("lightning-prune export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "path", type=Path, nargs="?", help="to write, .onnx or .pt2; RUN/net.onnx if left out"
    )
    parser.add_argument(
        "--weights", type=Path, help="a checkpoint or .safetensors of the run instead of its net.pt"
    )
    parser.add_argument("--shape", type=int, nargs="+", default=(), help="of the input, batch included")
    parser.add_argument("--fixed-batch", action="store_true", help="for the shape's number of samples only")
    given = parser.parse_args(arguments)
    path = given.path or given.run / "net.onnx"
    try:
        apart = export_run(given.run, path, given.weights, not given.fixed_batch, given.shape)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"lightning-prune export: {error}") from error
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, within {apart:.1g} of eager, record inside")
