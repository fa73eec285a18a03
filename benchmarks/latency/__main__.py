"""Latency as it is predicted from a table, against the latency that is measured.

    python -m benchmarks.latency

For each of three networks a table is built (``LatencyTable``, one thread), and thirty random cuts are predicted
and measured, in turns with the dense network, in one process; what counts is the ratio to the dense one. Then ten
more, in which every layer keeps a multiple of 16 channels. The cuts on which the table's correction was fitted have
another seed. Then the network is pruned, L2, to half of its latency and to half of its MACs, with and without
``channel_multiple=16``, and all are measured. Times are processor time of the one thread, the tenth percentile,
since the machine may do other things; its load is written down. At last one network is compiled with a few of its
cuts, half a minute or more each (``--compiled 0`` leaves that out). Writes ``latency.json`` and ``latency.md``; what
the former holds and is not asked for (``--executions``, ``--networks``) stays.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

from benchmarks.common.machine import machine, versions
from benchmarks.latency.report import page
from lightning_prune import LatencyTable, Limits, prune_, select, trace
from lightning_prune.criteria import L2
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency.backends import EXECUTIONS, random_on
from lightning_prune.latency.calibration import random_units
from lightning_prune.latency.profiler import BackendSettings
from lightning_prune.latency.timing import beside, timed
from lightning_prune.segmentation.networks.ritnet import RITnet
from lightning_prune.selection.budget import reachable

SEED = 2000  # not that of the cuts by which the tables' model was found; the tables' own begin at 0
LIMITS = Limits(0.95)
MULTIPLE = 16
ROUNDED = 10  # random cuts that leave multiples
COMPILED_CUTS = 4  # on which a compiled table is fitted
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "smp.Unet(resnet18)": (
        lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3),
        (1, 1, 96, 96),
    ),
    "torchvision mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (1, 3, 224, 224)),
    "RITnet": (RITnet, (1, 1, 160, 96)),
}
#: the one that is compiled as well
COMPILED = "smp.Unet(resnet18)"
WIDTHS = (224, 228, 229, 230, 231, 232, 240)


def cut(net: nn.Module, example: torch.Tensor, gone: Sequence[int]) -> nn.Module:
    """A copy without these units."""
    small = copy.deepcopy(net)
    prune_(small, trace(small, example), gone)
    return small


def goal(graph: ChannelGraph) -> float:
    """Half of the latency; where that cannot be reached, also not with a multiple, half of what can."""
    least = reachable(graph, limits=LIMITS, channel_multiple=MULTIPLE)["latency"] / graph.cost("latency")
    return 0.5 if least < 0.45 else round((1 + least) / 2, 2)


def chosen(
    net: nn.Module, graph: ChannelGraph, resource: str, share: float, multiple: int
) -> tuple[list[int], float]:
    """What L2 removes for a share of a resource, and the latency that is predicted."""
    scores = L2()(graph, net, {})
    plan = select(graph, scores, {resource: share}, limits=LIMITS, channel_multiple=multiple)
    units = plan.remove.tolist()
    return units, graph.cost("latency", units) / graph.cost("latency")


def by_latency(
    net: nn.Module, graph: ChannelGraph, table: LatencyTable, share: float, multiple: int
) -> tuple[list[int], float]:
    """Likewise for a share of the latency, chosen twice: in between, a copy of the table is fitted to the first."""
    refitted, (first, _) = copy.copy(table), chosen(net, graph, "latency", share, multiple)
    refitted.refit(graph, first)
    return chosen(net, graph.with_resources({"latency": refitted}), "latency", share, multiple)


def budgets(net: nn.Module, graph: ChannelGraph, table: LatencyTable) -> Iterator[dict[str, Any]]:
    """What is pruned to a share of the latency, and of the MACs."""
    share = goal(graph)
    for multiple in (1, MULTIPLE):
        found = {
            "latency": by_latency(net, graph, table, share, multiple),
            "macs": chosen(net, graph, "macs", share, multiple),
        }
        for kind, (units, predicted) in found.items():
            told = {"budget": kind, "share": share, "multiple": multiple}
            yield {**told, "units": units, "predicted": round(predicted, 4)}


def randomly(graph: ChannelGraph, cuts: int, rounded: int) -> Iterator[dict[str, Any]]:
    """Random cuts, and what is predicted for each."""
    generator = np.random.default_rng(SEED)
    for multiple in [1] * cuts + [MULTIPLE] * rounded:
        units = random_units(graph, generator, multiple=multiple)
        predicted = graph.cost("latency", units) / graph.cost("latency")
        yield {"multiple": multiple, "units": units, "predicted": round(predicted, 4)}


def measured(
    rows: Sequence[dict[str, Any]], net: nn.Module, graph: ChannelGraph, table: LatencyTable, times: int
) -> float:
    """Cut and time what is in ``rows``, write MACs and latency into them, and return the dense nanoseconds."""
    assert graph.evidence is not None
    (example,) = random_on(graph.evidence.inputs, torch.device("cpu"))
    nets = [net, *(cut(net, example, row["units"]) for row in rows)]
    with table.place.settled():
        whole = EXECUTIONS[table.execution].whole
        first, *others = (whole(each, (example,), {}, 1) for each in nets)
        dense, *found = beside(first, others, torch.device("cpu"), 1, times)
    for row, time_taken in zip(rows, found, strict=True):
        row["macs"] = round(graph.cost("macs", row.pop("units")) / graph.cost("macs"), 4)
        row["measured"] = round(time_taken / dense, 4)
    return dense


def errors(rows: Sequence[dict[str, Any]], by: str = "predicted") -> list[float]:
    """Relative errors of what is predicted."""
    return [abs(row[by] / row["measured"] - 1) for row in rows]


def examine(name: str, execution: Any, cuts: int, times: int) -> dict[str, Any]:
    """Build the table of one network; predict and measure."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    compiled = execution == "compiled"
    net, example = make().eval(), torch.rand(shape)
    given = {"cuts": COMPILED_CUTS} if compiled else {}
    table, start = LatencyTable(execution=execution, threads=1, **given), time.process_time()
    graph = trace(net, example)
    built = table.build(graph)
    seconds = time.process_time() - start
    graph = graph.with_resources({"latency": table})
    random = list(randomly(graph, cuts, 0 if compiled else ROUNDED))
    pruned = [] if compiled else list(budgets(net, graph, table))
    dense = measured([*random, *pruned], net, graph, table, times)
    free, rounded = random[:cuts], random[cuts:]
    return {
        "network": name, "execution": execution, "shape": list(shape), "dense_ms": round(dense / 1e6, 3),
        "build_cpu_seconds": round(seconds, 1), "points": built.info["points"], "cuts": cuts,
        "correction": asdict(built.correction), "median_error": round(median(errors(free)), 4),
        "largest_error": round(max(errors(free)), 4), "median_error_of_macs": round(median(errors(free, "macs")), 4),
        "median_error_of_multiples": round(median(errors(rounded)), 4) if rounded else None,
        "rows": random, "budgets": pruned,
    }  # fmt: skip


def widths(execution: Any) -> dict[str, float]:
    """Microseconds of a depthwise convolution, 5 x 5 on 14 x 14, of channels around a multiple of four."""
    most = max(WIDTHS)
    middle = nn.Conv2d(most, most, 5, padding=2, groups=most)
    net = nn.Sequential(nn.Conv2d(3, most, 1), middle, nn.Conv2d(most, 3, 1)).eval()
    place = BackendSettings(execution, torch.device("cpu"), 1)
    _, depthwise, _ = EXECUTIONS[place.execution].pieces(trace(net, torch.zeros(1, 3, 14, 14)))
    with place.settled():
        runs = [depthwise.run((width,), place.device) for width in WIDTHS]
        times = timed(runs, place.device, place.threads)
    return {str(width): round(each / 1e3, 1) for width, each in zip(WIDTHS, times, strict=True)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write both files."""
    parser = argparse.ArgumentParser("python -m benchmarks.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--executions", nargs="*", default=["eager", "onnx"], choices=["eager", "onnx"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--cuts", type=int, default=30)
    parser.add_argument("--times", type=int, default=15, help="runs of each network that count")
    parser.add_argument(
        "--compiled", type=int, default=5, help="cuts of the network that is compiled; 0: none"
    )
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = earlier(asked.docs)
    failed: list[str] = []
    tasks = [(name, execution, asked.cuts) for execution in asked.executions for name in asked.networks]
    tasks += [(COMPILED, "compiled", asked.compiled)] if asked.compiled else []
    for name, execution, cuts in tasks:
        start, load = time.perf_counter(), os.getloadavg()[0]
        try:
            found = examine(name, execution, cuts, asked.times)
        except (RuntimeError, ValueError) as error:  # the others count all the same
            failed.append(f"{name}, {execution}: {error}")
            continue
        took = {"minutes": (time.perf_counter() - start) / 60, "loads": [load, os.getloadavg()[0]]}
        rows[name, execution] = {**found, **took}
        write([rows[key] for key in sorted(rows, key=_place)], asked.docs)
    print((asked.docs / "latency.md").read_text())
    if failed:
        raise SystemExit("\n".join(["not measured:", *failed]))


def earlier(docs: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured before; it stays unless it is measured again."""
    file = docs / "latency.json"
    results = json.loads(file.read_text())["results"] if file.exists() else []
    return {(row["network"], row["execution"]): row for row in results}


def _place(key: tuple[str, str]) -> tuple[int, int]:
    return list(EXECUTIONS).index(key[1]), list(NETWORKS).index(key[0])  # type: ignore[arg-type]


def write(rows: Sequence[dict[str, Any]], docs: Path) -> None:
    """Both files."""
    loads = [load for row in rows for load in row["loads"]]
    head = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": machine(),
        "cores": os.cpu_count(), "load": f"{min(loads):.1f} to {max(loads):.1f}",
        "minutes": round(sum(row["minutes"] for row in rows), 1),
        "widths": {name: widths(name) for name in ("eager", "onnx")},
    }  # fmt: skip
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "latency.json").write_text(json.dumps({**head, "results": list(rows)}, indent=1) + "\n")
    (docs / "latency.md").write_text(page(rows, head, MULTIPLE, ROUNDED))


if __name__ == "__main__":
    main()
