"""``lightning-prune export``: write the pruned network of a run as ONNX model or ``torch.export`` program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate

from lightning_prune.cli.config import load_config
from lightning_prune.cli.parsers import read
from lightning_prune.reporting.run_folder import NET, load_net
from lightning_prune.serialization.export import export
from lightning_prune.serialization.saving import read_network

__all__ = ["export_run", "main"]


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
    config, source = load_config(folder), weights or folder / NET
    net = load_net(instantiate(config.net, _convert_="all"), source)
    example = torch.zeros(tuple(shape or config.module.example_input_shape))
    return export(net, example, path, read_network(source).record, dynamic_batch=dynamic_batch)


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("export", arguments)
    path = options.path or options.run / "net.onnx"
    try:
        difference = export_run(options.run, path, options.weights, not options.fixed_batch, options.shape)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise SystemExit(f"lightning-prune export: {error}") from error
    print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, with the pruning record; outputs within {difference:.1g} "
        "of those in PyTorch"
    )
