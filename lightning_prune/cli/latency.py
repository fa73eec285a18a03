"""``lightning-prune latency``: measure the network of a configuration, for budgets in time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import track

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import EXPECTED_ERRORS, add_to_path, root_cause
from lightning_prune.cli.parsers import read
from lightning_prune.cli.preflight import check_values, composed
from lightning_prune.graph.trace import trace
from lightning_prune.latency.store import Measurements
from lightning_prune.latency.table import LatencyTable
from lightning_prune.utils.formatting import counted

__all__ = ["main", "measure"]


def measure(
    table: LatencyTable, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> Measurements:
    """Build the network of a configuration, and measure it into ``table``, with a progress bar.

    Args:
        table: where and how to measure, and the file to write.
        overrides: of the configuration, as on the command line: ``net=fpn``.
        config_dir: folder with configurations and modules of one's own.
    """
    add_to_path(config_dir)
    config = composed(TrainArguments(list(overrides), config_dir))
    check_values(config, "net", "task")
    net = instantiate(config.net, _convert_="all")
    graph = trace(net, torch.zeros(tuple(config.module.example_input_shape)))
    return table.build(graph, _with_progress)


def _with_progress(indices: Sequence[int]) -> Iterable[int]:
    return track(indices, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty())


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = vars(read("latency", arguments))
    overrides, config_dir = options.pop("overrides"), options.pop("config_dir")
    try:
        measured = measure(LatencyTable(**options), overrides, config_dir)
    except EXPECTED_ERRORS as error:
        raise SystemExit(f"lightning-prune latency: {root_cause(error)}") from error
    deviation = measured.correction.error
    accuracy = "" if deviation is None else f", random cuts predicted within {deviation:.1%}"
    print(
        f"{options['path']}: {measured.info['milliseconds']} ms, {measured.execution} on {measured.device}, "
        f"{counted(measured.threads, 'thread')}{accuracy}; "
        f"{counted(measured.info['points'], 'point')} in {measured.info['seconds']} s"
    )
