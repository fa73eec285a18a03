"""Compare the optimal selection with the greedy one at equal measured latency.

    python -m benchmarks.latency.selection                # writes docs/results/selection.md and data/selection.json
    python -m benchmarks.latency.selection --report       # only writes the page again, from the JSON
    python -m benchmarks.latency.selection --parts mobile # measures one part; the others stay

Part ``programs``: the time that a selection takes, and the importance that it removes, for half of the MACs and
half of the parameters at once (L2, random weights). Part ``mobile``: MobileNet-V3-small in ONNX Runtime at half of
its latency, each plan measured and made again up to five times (``LatencyTable(turns=5)``); then it is measured
five times. Part ``mobile-eager``: the same in PyTorch, at 74 % of its latency. Part ``scores``: networks of
``benchmarks.quality``, cut to half of their latency in ONNX Runtime by the default criterion and by shares of output
energy (``OutputEnergy(normalise="none")``), repaired, and trained for as long as the second stage there. Measured
latencies are medians of ratios, network and dense network in turns, in processor time of one thread.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torchvision

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.latency.selection_report import page
from benchmarks.quality.tasks import FOLDER, STAGE_RATES, Task, dense, make_task, score
from benchmarks.quality.training import fit, recalibrate
from lightning_prune import LatencyTable, Limits, PruningPolicy, select, trace
from lightning_prune.compensation.repair import cut_and_compensate_
from lightning_prune.criteria import L2, Criterion, OutputEnergy
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.latency.backends import ExecutionName
from lightning_prune.latency.calibration import measured_ratio
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.step import importance_of
from lightning_prune.pruning.training import Training
from lightning_prune.selection.dense_sizes import DenseSizes

LIMITS = Limits(0.95)
TURNS, MEASUREMENTS, SHARE = 5, 5, 0.5
EAGER_SHARE = 0.74  # half-way to the lowest latency that MobileNet-V3-small can reach in PyTorch
STAGE = 1
NETWORKS = {
    "torchvision resnet50": (torchvision.models.resnet50, (1, 3, 224, 224)),
    "smp.Unet(resnet34)": (lambda: smp.Unet("resnet34", encoder_weights=None), (1, 3, 128, 128)),
    "torchvision mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (1, 3, 224, 224)),
}
SELECTIONS = ("greedy", "optimal")
CRITERIA: dict[str, Criterion] = {
    "default": default_criterion(),
    "output energy, shares": OutputEnergy(normalise="none"),
}
Row = dict[str, Any]


def programs(args: argparse.Namespace) -> Iterator[Row]:
    """Yield seconds, removed importance and gap of both selections for each network."""
    for name, (build, shape) in NETWORKS.items():
        torch.manual_seed(0)
        net = build().eval()
        graph = trace(net, torch.zeros(shape))
        scores = L2()(graph, net, {})
        for multiple in (1, 16):
            for selection in SELECTIONS:
                start = time.process_time()
                plan = select(
                    graph, scores, {"macs": SHARE, "params": SHARE}, limits=LIMITS, channel_multiple=multiple,
                    selection=selection,
                )  # fmt: skip
                yield {
                    "network": name, "multiple": multiple, "selection": selection, "gap": plan.gap,
                    "seconds": round(time.process_time() - start, 2),
                    "loss": round(float(scores[plan.remove].sum() / scores[graph.prunable].sum()), 4),
                }  # fmt: skip


def mobile(
    args: argparse.Namespace, execution: ExecutionName = "onnx", share: float = SHARE
) -> Iterator[Row]:
    """Yield predicted and measured latency of MobileNet-V3-small, cut to a share of it."""
    build, shape = NETWORKS["torchvision mobilenet_v3_small"]
    torch.manual_seed(0)
    net, example = build().eval(), torch.rand(shape)
    scores_of = L2()
    for multiple in (1, 16):
        for selection in SELECTIONS:
            table = LatencyTable(args.tables, execution=execution, threads=1, turns=TURNS)
            policy = PruningPolicy(
                {"latency": share}, limits=LIMITS, channel_multiple=multiple, selection=selection,
                resources={"latency": table},
            )  # fmt: skip
            graph = policy.trace(net, ((example,), {}))
            start = time.process_time()
            plan = policy.plan(graph, scores := scores_of(graph, net, {}), DenseSizes.of(graph))
            seconds = round(time.process_time() - start, 1)
            ratios = [measured_ratio(graph, table.place, list(plan)) for _ in range(MEASUREMENTS)]
            yield {
                "multiple": multiple, "selection": selection, "seconds": seconds,
                "predicted": round(plan.costs["latency"].share, 4), "macs": round(plan.costs["macs"].share, 4),
                "measured": [round(ratio, 4) for ratio in ratios],
                "loss": round(float(scores[plan.remove].sum() / scores[graph.prunable].sum()), 4),
            }  # fmt: skip


def scores(args: argparse.Namespace) -> Iterator[Row]:
    """Yield scores of trained networks that both selections cut to half of their latency in ONNX Runtime."""
    for name in args.tasks:
        task = make_task(name)
        for seed in args.seeds:
            net = dense(task, seed, args.networks).to(memory_format=torch.contiguous_format)
            dense_score = score(net, task, task.data.test).value
            for criterion, selection in product(CRITERIA, SELECTIONS):
                yield {
                    "task": name, "seed": seed, "criterion": criterion, "selection": selection,
                    "dense": dense_score, **cut_and_train(net, task, args.tables, criterion, selection),
                }  # fmt: skip


def cut_and_train(net: torch.nn.Module, task: Task, tables: Path, criterion_name: str, selection: Any) -> Row:
    """Return latency and score of a copy that is cut, repaired and trained."""
    net = copy.deepcopy(net).eval()
    table = LatencyTable(tables, execution="onnx", threads=1, turns=TURNS)
    policy = PruningPolicy(
        {"latency": SHARE},
        limits=LIMITS,
        channel_multiple=8,
        selection=selection,
        resources={"latency": table},
    )
    example = task.example.contiguous()
    graph = policy.trace(net, ((example,), {}))
    batches, criterion = task.calibration_batches(), CRITERIA[criterion_name]
    statistics = collect_statistics(criterion, net, graph, batches, Training(batches, _loss, lambda net: 0.0))
    importance = importance_of(criterion, graph, net, statistics)
    plan = policy.plan(graph, importance, DenseSizes.of(graph))
    measured = median(measured_ratio(graph, table.place, list(plan)) for _ in range(MEASUREMENTS))
    cut_and_compensate_(net, graph, plan.remove, batches)
    row = {"macs": round(plan.costs["macs"].share, 4), "measured": round(measured, 4)}
    row["after_cut"] = score(net, task, task.data.test).value
    fit(net, task.data.train, task.stage_steps[STAGE], task.batch, STAGE_RATES[STAGE], seed=0)
    recalibrate(net, task.data.train, task.batch)
    return {**row, "trained": score(net, task, task.data.test).value}


def _loss(net: torch.nn.Module, batch: Any) -> Any:
    return net(batch[0])


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "programs": programs,
    "mobile": mobile,
    "mobile-eager": partial(mobile, execution="eager", share=EAGER_SHARE),
    "scores": scores,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the chosen parts, write both files after each, and print the page."""
    parser = page_parser("latency.selection", __doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tasks", nargs="+", default=["fashion", "scenes"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--networks", type=Path, default=FOLDER, help="folder of trained dense networks")
    parser.add_argument(
        "--tables", type=Path, default=FOLDER.parent / "latency", help="folder of latency tables"
    )
    args = parser.parse_args(arguments)
    files = ReportFiles("selection", args.docs)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    content = files.load() if files.data.is_file() else {}
    for part in () if args.report else args.parts:
        rows = [row for row in content.get(part, []) if row.get("task") not in (None, *args.tasks)]
        for row in PARTS[part](args):
            rows.append(row)
            print(row, flush=True)
            content[part] = rows  # with those of other tasks from before
            content |= {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "machine": machine()}
            content["load"] = {**content.get("load", {}), part: round(os.getloadavg()[0], 1)}
            files.save(content)
    files.write_page(page(content))
    print(files.page.read_text())


if __name__ == "__main__":
    main()
