"""Compare the latency predicted from a table with the measured latency, for three networks.

    python -m benchmarks.latency             # writes docs/results/latency.md and data/latency.json
    python -m benchmarks.latency --report    # only writes the page again, from the JSON

A table is built for each network (``LatencyTable``, one thread). Thirty random cuts are predicted, and measured in
one process alternately with the dense network; the result is the ratio to the dense network. Ten more cuts leave a
multiple of 16 channels in each layer. The seed differs from that of the cuts on which the table is calibrated.

Then the network is pruned by L2 to half of its latency and to half of its MACs, with and without
``channel_multiple=16``, and all results are measured. Times are processor time of one thread, the tenth percentile,
since the machine may do other work; its load is recorded. At the end one network is compiled with a few of its cuts,
which takes half a minute or more each (``--compiled 0`` leaves this out). Results in the JSON that are not measured
again (``--executions``, ``--networks``) stay.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.latency.report import page
from lightning_prune import LatencyTable, Limits, prune_, select, trace
from lightning_prune.criteria import L2
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.latency.backends import EXECUTIONS, random_inputs
from lightning_prune.latency.calibration import random_units
from lightning_prune.latency.profiler import BackendSettings
from lightning_prune.latency.timing import time_against_reference, time_calls
from lightning_prune.segmentation.networks.ritnet import RITnet
from lightning_prune.selection.budget import reachable

SEED = (
    2000  # tables use seeds from 0 on for their calibration; SEED was not used to develop their model either
)
LIMITS = Limits(0.95)
MULTIPLE = 16
ROUNDED = 10  # number of random cuts that leave multiples
COMPILED_CUTS = 4  # number of cuts on which a table of a compiled network is calibrated
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "smp.Unet(resnet18)": (
        lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3),
        (1, 1, 96, 96),
    ),
    "torchvision mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (1, 3, 224, 224)),
    "RITnet": (RITnet, (1, 1, 160, 96)),
}
COMPILED_NETWORK = "smp.Unet(resnet18)"
WIDTHS = (224, 228, 229, 230, 231, 232, 240)
CPU = torch.device("cpu")
Row = dict[str, Any]


def cut(net: nn.Module, example: torch.Tensor, units: Sequence[int]) -> nn.Module:
    """Return a copy without these units."""
    copied = copy.deepcopy(net)
    prune_(copied, trace(copied, example), units)
    return copied


def goal(graph: ChannelGraph) -> float:
    """Return the budget, a share of the latency: half, or half-way to the lowest share that can be reached."""
    least = reachable(graph, limits=LIMITS, channel_multiple=MULTIPLE)["latency"] / graph.cost("latency")
    return 0.5 if least < 0.45 else round((1 + least) / 2, 2)


def select_units(
    net: nn.Module, graph: ChannelGraph, resource: str, share: float, multiple: int
) -> tuple[list[int], float]:
    """Return the units that L2 removes for a share of a resource, and the predicted share of the latency."""
    scores = L2()(graph, net, {})
    plan = select(graph, scores, {resource: share}, limits=LIMITS, channel_multiple=multiple)
    units = plan.remove.tolist()
    return units, graph.cost("latency", units) / graph.cost("latency")


def select_by_latency(
    net: nn.Module, graph: ChannelGraph, table: LatencyTable, share: float, multiple: int
) -> tuple[list[int], float]:
    """Return the same for a share of the latency, with a copy of the table refitted to a first selection."""
    refitted, (first, _) = copy.copy(table), select_units(net, graph, "latency", share, multiple)
    refitted.refit(graph, first)
    return select_units(net, graph.with_resources({"latency": refitted}), "latency", share, multiple)


def budget_cuts(net: nn.Module, graph: ChannelGraph, table: LatencyTable) -> Iterator[Row]:
    """Yield the units and predictions of cuts to a share of the latency, and of the MACs."""
    share = goal(graph)
    for multiple in (1, MULTIPLE):
        selections = {
            "latency": select_by_latency(net, graph, table, share, multiple),
            "macs": select_units(net, graph, "macs", share, multiple),
        }
        for resource, (units, predicted) in selections.items():
            head = {"budget": resource, "share": share, "multiple": multiple}
            yield {**head, "units": units, "predicted": round(predicted, 4)}


def random_cuts(graph: ChannelGraph, cuts: int, rounded: int) -> Iterator[Row]:
    """Yield the units and predictions of random cuts; the last ``rounded`` leave multiples of channels."""
    generator = np.random.default_rng(SEED)
    for multiple in [1] * cuts + [MULTIPLE] * rounded:
        units = random_units(graph, generator, multiple=multiple)
        predicted = graph.cost("latency", units) / graph.cost("latency")
        yield {"multiple": multiple, "units": units, "predicted": round(predicted, 4)}


def measure_rows(
    rows: Sequence[Row], net: nn.Module, graph: ChannelGraph, table: LatencyTable, times: int
) -> float:
    """Cut and time the network of each row, replace its units by MACs and latency, return the dense nanoseconds."""
    (example,) = random_inputs(dense_trace_of(graph).examples[0][0], CPU)
    nets = [net, *(cut(net, example, row["units"]) for row in rows)]
    with table.place.active():
        make_call = EXECUTIONS[table.execution].network
        dense_call, *calls = (make_call(network, (example,), {}, 1) for network in nets)
        dense, *nanoseconds = time_against_reference(dense_call, calls, CPU, 1, times)
    for row, latency in zip(rows, nanoseconds, strict=True):
        row["macs"] = round(graph.cost("macs", row.pop("units")) / graph.cost("macs"), 4)
        row["measured"] = round(latency / dense, 4)
    return dense


def errors(rows: Sequence[Row], by: str = "predicted") -> list[float]:
    """Return the relative errors of the predictions; ``by="macs"``: of the share of MACs as a prediction."""
    return [abs(row[by] / row["measured"] - 1) for row in rows]


def examine(name: str, execution: Any, cuts: int, times: int) -> Row:
    """Build the table of one network; predict, measure, and return the result of the JSON."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    compiled = execution == "compiled"
    net, example = make().eval(), torch.rand(shape)
    options = {"cuts": COMPILED_CUTS} if compiled else {}
    table, start = LatencyTable(execution=execution, threads=1, **options), time.process_time()
    graph = trace(net, example)
    built = table.build(graph)
    seconds = time.process_time() - start
    graph = graph.with_resources({"latency": table})
    random_rows = list(random_cuts(graph, cuts, 0 if compiled else ROUNDED))
    budget_rows = [] if compiled else list(budget_cuts(net, graph, table))
    dense = measure_rows([*random_rows, *budget_rows], net, graph, table, times)
    return {
        "network": name, "execution": execution, "shape": list(shape), "dense_ms": round(dense / 1e6, 3),
        "build_cpu_seconds": round(seconds, 1), "points": built.info["points"], "cuts": cuts,
        "correction": asdict(built.correction), **error_summary(random_rows[:cuts], random_rows[cuts:]),
        "rows": random_rows, "budgets": budget_rows,
    }  # fmt: skip


def error_summary(free: Sequence[Row], rounded: Sequence[Row]) -> Row:
    """Return medians of errors: of cuts to any width (``free``), and of cuts to multiples (``rounded``)."""
    return {
        "median_error": round(median(errors(free)), 4),
        "largest_error": round(max(errors(free)), 4),
        "median_error_of_macs": round(median(errors(free, "macs")), 4),
        "median_error_of_multiples": round(median(errors(rounded)), 4) if rounded else None,
    }


def depthwise_times(execution: Any) -> dict[str, float]:
    """Return microseconds of a depthwise convolution, 5x5 on 14x14, by its number of channels (``WIDTHS``)."""
    most = max(WIDTHS)
    depthwise = nn.Conv2d(most, most, 5, padding=2, groups=most)
    net = nn.Sequential(nn.Conv2d(3, most, 1), depthwise, nn.Conv2d(most, 3, 1)).eval()
    settings = BackendSettings(execution, CPU, 1)
    _, piece, _ = EXECUTIONS[settings.execution].pieces(trace(net, torch.zeros(1, 3, 14, 14)))
    with settings.active():
        calls = [piece.make_call((width,), CPU) for width in WIDTHS]
        nanoseconds = time_calls(calls, CPU, settings.threads)
    return {str(width): round(value / 1e3, 1) for width, value in zip(WIDTHS, nanoseconds, strict=True)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("latency", __doc__)
    add = parser.add_argument
    add("--executions", nargs="*", default=["eager", "onnx"], choices=["eager", "onnx"])
    add("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    add("--cuts", type=int, default=30, help="random cuts of each network")
    add("--times", type=int, default=15, help="timed runs of each network")
    add("--compiled", type=int, default=5, help="cuts of the network that is compiled; 0: none")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write both files after each network, and print the page."""
    args = parse(arguments)
    files = ReportFiles("latency", args.docs)
    failures = [] if args.report else measure(args, files)
    write(files)
    print(files.page.read_text())
    if failures:
        raise SystemExit("\n".join(["not measured:", *failures]))


def measure(args: argparse.Namespace, files: ReportFiles) -> list[str]:
    """Measure all networks; return a message for each that failed, so that the others are still measured."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results, failures = stored(files), list[str]()
    tasks = [(name, execution, args.cuts) for execution in args.executions for name in args.networks]
    tasks += [(COMPILED_NETWORK, "compiled", args.compiled)] if args.compiled else []
    for name, execution, cuts in tasks:
        start, load = time.perf_counter(), os.getloadavg()[0]
        try:
            result = examine(name, execution, cuts, args.times)
        except (RuntimeError, ValueError) as error:
            failures.append(f"{name}, {execution}: {error}")
            continue
        duration = {"minutes": (time.perf_counter() - start) / 60, "loads": [load, os.getloadavg()[0]]}
        results[name, execution] = {**result, **duration}
        save([results[key] for key in sorted(results, key=_place)], files)
        write(files)
    return failures


def stored(files: ReportFiles) -> dict[tuple[str, str], Row]:
    """Return the results of the JSON by network and execution; they stay unless they are measured again."""
    results = files.load()["results"] if files.data.is_file() else []
    return {(row["network"], row["execution"]): row for row in results}


def _place(key: tuple[str, str]) -> tuple[int, int]:
    return list(EXECUTIONS).index(key[1]), list(NETWORKS).index(key[0])  # type: ignore[arg-type]


def save(rows: Sequence[Row], files: ReportFiles) -> None:
    """Write the JSON: date, versions, machine, load, times of the depthwise convolution, and the results."""
    loads = [load for row in rows for load in row["loads"]]
    files.save({
        "date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": machine(),
        "cores": os.cpu_count(), "load": f"{min(loads):.1f} to {max(loads):.1f}",
        "minutes": round(sum(row["minutes"] for row in rows), 1),
        "widths": {name: depthwise_times(name) for name in ("eager", "onnx")},
        "results": list(rows),
    })  # fmt: skip


def write(files: ReportFiles) -> None:
    """Write the page from the JSON."""
    files.write_page(page(files.load(), MULTIPLE, ROUNDED))


if __name__ == "__main__":
    main()
