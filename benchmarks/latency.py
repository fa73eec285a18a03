"""Latency as it is predicted from a table, against the latency that is measured.

    python -m benchmarks.latency

For each of three networks a table is built (``LatencyTable``, one thread), and thirty random cuts are predicted
and measured, in turns with the dense network, in one process; what counts is the ratio to the dense one. The cuts on
which the table's correction was fitted have another seed. Then the network is pruned, L2, to half of its latency and
to half of its MACs, and both are measured. Times are medians of processor time of the one thread, since the machine
may do other things; its load is written down. ``--executions compiled`` compiles every cut, half a minute
or more each: give it few ``--cuts``. Writes ``latency.json`` and ``latency.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

from benchmarks.zoo_report import machine, versions
from lightning_prune import LatencyTable, Limits, prune_, select, trace
from lightning_prune.correction import random_units
from lightning_prune.criteria import L2
from lightning_prune.executions import EXECUTIONS
from lightning_prune.graph import ChannelGraph
from lightning_prune.networks import RITnet
from lightning_prune.selection import reachable
from lightning_prune.timing import medians

SEED = 1000  # the table's own random cuts begin at 0
LIMITS = Limits(0.95)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "smp.Unet(resnet18)": (
        lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3),
        (1, 1, 96, 96),
    ),
    "torchvision mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (1, 3, 224, 224)),
    "RITnet": (RITnet, (1, 1, 160, 96)),
}


def cut(net: nn.Module, example: torch.Tensor, gone: Sequence[int]) -> nn.Module:
    """A copy without these units."""
    small = copy.deepcopy(net)
    prune_(small, trace(small, example), gone)
    return small


def goal(graph: ChannelGraph) -> float:
    """Half of the latency; where that cannot be reached, half of what can."""
    least = reachable(graph, limits=LIMITS)["latency"] / graph.cost("latency")
    return 0.5 if least < 0.45 else round((1 + least) / 2, 2)


def chosen(net: nn.Module, graph: ChannelGraph, resource: str, share: float) -> list[int]:
    """What L2 removes for a share of a resource."""
    return select(graph, L2()(graph, net, {}), {resource: share}, limits=LIMITS).remove.tolist()


def by_latency(
    net: nn.Module, dense: ChannelGraph, table: LatencyTable, share: float
) -> tuple[list[int], float]:
    """What goes for a share of the latency, chosen twice: the table is fitted to the first choice in between.

    Returns:
        The units, and the share that the table then predicts.
    """
    first = chosen(net, dense.with_resources({"latency": table}), "latency", share)
    table.refit(dense, first)
    graph = dense.with_resources({"latency": table})
    units = chosen(net, graph, "latency", share)
    return units, graph.cost("latency", units) / graph.cost("latency")


def examine(name: str, execution: Any, cuts: int, times: int) -> dict[str, Any]:
    """Build the table of one network; predict and measure."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, example = make().eval(), torch.rand(shape)
    table, start = LatencyTable(execution=execution, threads=1), time.process_time()
    dense = trace(net, example)
    built = table.build(dense)
    seconds = time.process_time() - start
    graph, generator = dense.with_resources({"latency": table}), np.random.default_rng(SEED)
    share = goal(graph)
    by_time, predicted = by_latency(net, dense, table, share)
    halves = [by_time, chosen(net, graph, "macs", share)]
    gone = [[], *halves, *(random_units(graph, generator) for _ in range(cuts))]
    nets = [net, *(cut(net, example, units) for units in gone[1:])]
    with table.place.settled():
        whole = EXECUTIONS[table.execution].whole
        found = medians([whole(each, (example,), {}, 1) for each in nets], torch.device("cpu"), 1, times)
    shares = {
        kind: [round(graph.cost(kind, units) / graph.cost(kind), 4) for units in gone]
        for kind in ("latency", "macs")
    }
    shares["latency"][1] = round(predicted, 4)
    measured = [round(each / found[0], 4) for each in found]
    rows = [
        {"macs": m, "predicted": p, "measured": r}
        for m, p, r in zip(shares["macs"], shares["latency"], measured, strict=True)
    ]
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows[3:]]
    by_macs = [abs(row["macs"] / row["measured"] - 1) for row in rows[3:]]
    return {
        "network": name, "execution": execution, "shape": list(shape), "dense_ms": round(found[0] / 1e6, 3),
        "build_cpu_seconds": round(seconds, 1), "points": built.info["points"], "cuts": cuts,
        "median_error": round(median(errors), 4), "largest_error": round(max(errors), 4),
        "median_error_of_macs": round(median(by_macs), 4), "share": share, "by_latency": rows[1], "by_macs": rows[2],
        "rows": rows[3:],
    }  # fmt: skip


def page(rows: Sequence[dict[str, Any]], head: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Latency: predicted and measured",
        "",
        f"{head['date']} · torch {head['versions']['torch']} · {head['machine']} · load {head['load']} on "
        f"{head['cores']} cores · {head['minutes']} minutes. Made by `python -m benchmarks.latency`.",
        "",
        "Random cuts, measured in turns with the dense network; the error is that of the ratio to the dense network. "
        "Times are processor time of the one thread, medians. *By MACs*: the error of taking the share of the MACs "
        "for that of the time. Tables are built as in [budgets.md](budgets.md#time).",
        "",
        "| network | execution | dense, ms | cuts | **median error** | largest | by MACs | to build, CPU s |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['execution']} | {r['dense_ms']:.1f} | {r['cuts']} | "
            f"**{r['median_error']:.1%}** | {r['largest_error']:.1%} | {r['median_error_of_macs']:.0%} | "
            f"{r['build_cpu_seconds']:.0f} |"
            for r in rows
        ),
        "",
        "Pruned by L2 (random weights) to half of the latency (where that is out of reach, to half of what can go), "
        "and to the same share of the MACs. For the latency, what goes is chosen twice: in between, the table is "
        "fitted to the first choice (`LatencyTable.refit`).",
        "",
        "| network | execution | budget | MACs | latency, predicted | **latency, measured** |",
        "|:--|:--|:--|--:|--:|--:|",
        *(
            f"| {r['network']} | {r['execution']} | {kind} {r['share']:.0%} | {half['macs']:.1%} | "
            f"{half['predicted']:.1%} | **{half['measured']:.1%}** |"
            for r in rows
            for kind, half in (("latency", r["by_latency"]), ("MACs", r["by_macs"]))
        ),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write both files."""
    parser = argparse.ArgumentParser("python -m benchmarks.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--executions", nargs="+", default=["eager", "onnx"], choices=list(EXECUTIONS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--cuts", type=int, default=30)
    parser.add_argument("--times", type=int, default=15, help="runs of each network that count")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start, loads = time.perf_counter(), [os.getloadavg()[0]]
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for execution in asked.executions:
        for name in asked.networks:
            try:
                rows.append(examine(name, execution, asked.cuts, asked.times))
            except (RuntimeError, ValueError) as error:  # the others count all the same
                failed.append(f"{name}, {execution}: {error}")
            loads.append(os.getloadavg()[0])
            text = write(rows, loads, time.perf_counter() - start, asked.docs)
    print(text)
    if failed:
        raise SystemExit("\n".join(["not measured:", *failed]))


def write(rows: Sequence[dict[str, Any]], loads: Sequence[float], seconds: float, docs: Path) -> str:
    """Both files; the text of the page."""
    head = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": machine(),
        "cores": os.cpu_count(), "load": f"{min(loads):.1f} to {max(loads):.1f}", "minutes": round(seconds / 60, 1),
    }  # fmt: skip
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "latency.json").write_text(json.dumps({**head, "results": list(rows)}, indent=1) + "\n")
    (docs / "latency.md").write_text(text := page(rows, head))
    return text


if __name__ == "__main__":
    main()
