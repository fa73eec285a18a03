"""``lightning-prune latency``: measure the network of a configuration, for budgets in time (level 5)."""

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
    """Build the network of a configuration, and measure it into ``table``, showing progress.

    Args:
        table: where and how to measure, and where to write.
        overrides: of the configuration, as on the command line: ``net=fpn``.
    """
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    net = instantiate(config.net, _convert_="all")
    graph = trace(net, torch.zeros(tuple(config.module.example_input_shape)))
    return table.build(graph, _shown)


def _shown(indices: Sequence[int]) -> Iterable[int]:
    return track(indices, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty())


def main(arguments: Sequence[str]) -> None:
    """The command; see its ``--help``."""
    parser = argparse.ArgumentParser("lightning-prune latency", description=__doc__)
    parser.add_argument("path", help="to write: a .json file, or a folder with a file for each network")
    parser.add_argument("overrides", nargs="*", help="of the configuration: net=fpn data=folder ...")
    parser.add_argument("--execution", choices=get_args(ExecutionName), default="eager")
    parser.add_argument("--device", default="cpu", help="as torch names it")
    parser.add_argument("--threads", type=int, help="of the processor; all that torch has if left out")
    parser.add_argument(
        "--cuts", type=int, default=LatencyTable.cuts, help="random cuts to hold the sum against"
    )
    given = vars(parser.parse_args(arguments))
    overrides = given.pop("overrides")
    try:
        found = measure(LatencyTable(**given), overrides)
    except EXPECTED_ERRORS as error:
        raise SystemExit(f"lightning-prune latency: {root_cause(error)}") from error
    apart = found.correction.error
    within = "" if apart is None else f", random cuts within {apart:.1%}"
    print(
        f"{given['path']}: {found.info['milliseconds']} ms, {found.execution} on {found.device}, {found.threads} "
        f"thread(s){within}; {found.info['points']} points in {found.info['seconds']} s"
    )
