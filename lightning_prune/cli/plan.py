"""``lightning-prune plan``: what would be cut from a network, layer by layer, or what a run has cut."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from rich.console import Console
from torch import nn, zeros

from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.callbacks.methods.filter_pruning import FilterPruning
from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import EXPECTED_ERRORS, UsageError, add_to_path, load_config, root_cause
from lightning_prune.cli.early_checks import NEITHER, is_network_path
from lightning_prune.cli.parsers import read
from lightning_prune.cli.preflight import check_values, composed
from lightning_prune.criteria.base import as_criterion
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.summary import NetworkSummary, summarise
from lightning_prune.graph.trace import TraceError, trace
from lightning_prune.latency.store import load
from lightning_prune.reporting.layers import removed_units, vanished_modules
from lightning_prune.reporting.run_folder import CONFIG, NET, RECORD, load_net
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.example_inputs import as_example

__all__ = ["main", "plan_of_network", "plan_of_run"]

DEFAULT_SHAPE = (1, 3, 224, 224)
ALREADY = "is pruned already, and its plan is what it has cut: leave out the overrides, or name a dense run"


class Cut:
    """A network's graph, the units that are or would be removed, and the summary of both.

    Attributes:
        graph: of the dense network.
        remove: the units.
        summary: layer by layer.
    """

    def __init__(self, graph: ChannelGraph, remove: Sequence[int], summary: NetworkSummary) -> None:
        self.graph, self.remove, self.summary = graph, remove, summary


def plan_of_network(
    network: str | None,
    shape: Sequence[int],
    overrides: Sequence[str],
    config_dir: Path | None = None,
    table: Path | None = None,
) -> Cut:
    """Return what would be cut from an untrained network, by the criterion if it needs weights only, else by L2.

    Args:
        network: import path of a function or class that builds it; None: that of the configuration.
        shape: of its input; empty: that of the configuration, or of one image of 224 x 224.
        overrides: of the configuration, which gives budget, limits and criterion.
        config_dir: folder of configurations of one's own.
        table: latency table of the network.

    Raises:
        UsageError: an override is wrong.
        ValueError: the budget cannot be met.
    """
    config = _with_table(composed(TrainArguments([*overrides], config_dir)), table)
    check_values(config, "prune", *(["net", "task"] if network is None else []))
    net = instantiate(config.net if network is None else {"_target_": network}, _convert_="all")
    default = DEFAULT_SHAPE if network is not None else tuple(config.module.example_input_shape)
    return _planned(net, tuple(shape) or default, config.prune)


def plan_of_run(run: Path, overrides: Sequence[str] = (), table: Path | None = None) -> Cut:
    """Return what a run has cut; of a dense run, what would be cut from its trained network.

    Args:
        run: folder of the run.
        overrides: of the group ``prune``, for a dense run.
        table: latency table of the network.

    Raises:
        ValueError: there are overrides for a run that is pruned already.
    """
    config = load_config(run)
    net = instantiate(config.net, _convert_="all")
    shape = tuple(config.module.example_input_shape)
    record = PruningRecord.load(run / RECORD) if (run / RECORD).is_file() else PruningRecord()
    if record:
        if overrides:
            raise ValueError(f"{run} {ALREADY}")
        graph = trace(net, zeros(shape))
        graph = graph if table is None else graph.with_resources({"latency": instantiate(_resource(table))})
        remove = removed_units(graph, record)
        return Cut(graph, remove, _of_run(graph, remove, record, run))
    if (run / NET).is_file():
        load_net(net, run / NET)
    changed = _with_table(composed(TrainArguments([*overrides])), table)
    check_values(changed, "prune")
    return _planned(net, shape, changed.prune)


def _of_run(graph: ChannelGraph, remove: Sequence[int], record: PruningRecord, run: Path) -> NetworkSummary:
    return summarise(graph, remove, notes=[f"cut by the run {run}"], vanished=vanished_modules(record))


def _planned(net: nn.Module, shape: Sequence[int], prune: Any) -> Cut:
    """Select units by the group ``prune`` of a configuration, in one step."""
    if "_target_" not in (prune or ()):
        raise ValueError("with prune=none nothing is cut: choose a method, such as prune=ipad")
    callback: PruningCallback = instantiate(prune, _convert_="all")
    policy = callback.policy
    graph = policy.trace(net, as_example(zeros(tuple(shape))))
    policy.check(graph)
    plan, note = _scored(callback, graph, net)
    notes = list(filter(None, [plan.ending, note]))
    return Cut(graph, list(plan), summarise(graph, plan.remove, _targets(plan.costs), plan.closed, notes))


def _scored(callback: PruningCallback, graph: ChannelGraph, net: nn.Module) -> tuple[Plan, str]:
    """Return the plan by the criterion, or by what predicts it before training; and a note that says so."""
    criterion = as_criterion(callback.criterion)
    if isinstance(callback.method, FilterPruning) and criterion.observer(graph, net) is None:
        policy = replace(callback.policy, amount=None)
        return policy.plan(graph, criterion(graph, net, {}), DenseSizes.of(graph)), ""
    method = type(callback).__name__.removesuffix("Callback")
    name = type(criterion).__name__ if isinstance(callback.method, FilterPruning) else method
    return callback.policy.predict(graph, net), f"predicted from the weights alone; {name} observes training"


def _targets(costs: Any) -> dict[str, float]:
    return {name: change.target for name, change in costs.items() if change.target is not None}


def _with_table(config: DictConfig, table: Path | None) -> DictConfig:
    """Return a configuration whose plans count the times of a latency table, which budgets can name then."""
    if table is None or "_target_" not in (config.prune or ()):
        return config
    with open_dict(config):
        config.prune.resources = {**(config.prune.get("resources") or {}), "latency": _resource(table)}
    return config


def _resource(table: Path) -> dict[str, Any]:
    """Return the configuration of a measured table as a resource.

    Raises:
        FileNotFoundError: there is no table.
    """
    if not table.is_file():
        raise FileNotFoundError(f"there is no table {table}; measure it: lightning-prune latency {table}")
    measured = load(table)
    settings = {"path": str(table), "execution": measured.execution, "threads": measured.threads}
    # The times are those of the table's device, wherever they are looked at.
    return {"_target_": "lightning_prune.LatencyTable", **settings, "elsewhere": True}


def main(arguments: Sequence[str]) -> None:
    """Run the command with the arguments of its command line; ``--help`` lists them."""
    options = read("plan", arguments)
    add_to_path(options.config_dir)
    try:
        cut = _cut(options)
        _write(options, cut)
    except (TraceError, *EXPECTED_ERRORS) as error:
        raise SystemExit(f"lightning-prune plan: {root_cause(error)}") from error
    if options.json != Path("-"):
        Console(soft_wrap=False, width=options.width).print(cut.summary)


def _cut(options: argparse.Namespace) -> Cut:
    first, overrides = "".join(options.words[:1]), options.words
    if first and "=" not in first and not first.startswith(("~", "+")):
        overrides = options.words[1:]
        if (Path(first) / CONFIG).is_file():
            return plan_of_run(Path(first), overrides, options.latency)
        if not is_network_path(first):
            raise UsageError(f"{first!r} {NEITHER}")
        return plan_of_network(first, options.shape, overrides, options.config_dir, options.latency)
    return plan_of_network(None, options.shape, overrides, options.config_dir, options.latency)


def _write(options: argparse.Namespace, cut: Cut) -> None:
    if options.json == Path("-"):
        print(cut.summary.json())
    for path in filter(None, (options.json, options.html)):
        if path != Path("-"):
            cut.summary.save(path)
            print(f"wrote {path}", file=sys.stderr)
    if options.picture:
        cut.graph.show(options.picture, cut.remove)
        print(f"wrote {options.picture}", file=sys.stderr)
