"""``lightning-prune latency``: measure the network of a configuration, for budgets in time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import get_args

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console
from rich.progress import track

from lightning_prune.cli.config import EXPECTED_ERRORS, conf_dir, root_cause
from lightning_prune.graph.trace import trace
from lightning_prune.latency.backends import ExecutionName
from lightning_prune.latency.store import Measurements
from lightning_prune.latency.table import LatencyTable

__all__ = ["main", "measure"]


def measure(table: LatencyTable, overrides: Sequence[str] = ()) -> Measurements:
    """Build the network of a configuration, and measure it into ``table``, with a progress bar.

    Args:
        table: where and how to measure, and the file to write.
        overrides: of the configuration, as on the command line: ``net=fpn``.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    net = instantiate(config.net, _convert_="all")
    graph = trace(net, torch.zeros(tuple(config.module.example_input_shape)))
    return table.build(graph, _with_progress)


def _with_progress(indices: Sequence[int]) -> Iterable[int]:
    return track(indices, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty())


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = vars(_parser().parse_args(arguments))
    overrides = options.pop("overrides")
    try:
        measured = measure(LatencyTable(**options), overrides)
    except EXPECTED_ERRORS as error:
        raise SystemExit(f"lightning-prune latency: {root_cause(error)}") from error
    deviation = measured.correction.error
    accuracy = "" if deviation is None else f", random cuts predicted within {deviation:.1%}"
    print(
        f"{options['path']}: {measured.info['milliseconds']} ms, {measured.execution} on {measured.device}, "
        f"{measured.threads} thread(s){accuracy}; {measured.info['points']} points in {measured.info['seconds']} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lightning-prune latency", description=__doc__)
    parser.add_argument("path", help="file to write (.json), or a folder that gets a file for each network")
    parser.add_argument(
        "overrides", nargs="*", help="KEY=VALUE of the configuration: net=fpn data=folder ..."
    )
    parser.add_argument(
        "--execution", choices=get_args(ExecutionName), default="eager", help="how the network is executed"
    )
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, help="CPU threads; default: as many as torch uses")
    parser.add_argument(
        "--cuts",
        type=int,
        default=LatencyTable.cuts,
        help="number of random cuts to calibrate the sum of the operators on",
    )
    return parser
