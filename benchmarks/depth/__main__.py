"""Compare networks that lose residual blocks and channels with those that lose channels alone, by measured latency.

    python -m benchmarks.depth                      # all runs; finished ones are not repeated
    python -m benchmarks.depth --executions onnx    # only those in ONNX Runtime
    python -m benchmarks.depth --report             # only write docs/results/depth.md

The protocol, fixed before the runs. Networks and data are those of ``benchmarks.quality``: fashion (ResNet-20,
accuracy) and brain (U-Net with the first stages of ResNet-18, mean IoU), dense networks of five seeds. Each is cut
once to a share of its latency, predicted by a ``LatencyTable``, by both methods: with channels alone, and with
``DepthSettings(max_depth_ratio=1)`` besides, which chooses blocks and their number by itself. All else is equal:
default criterion on the same images, limits, greedy selection, repair, and after the cut the same training: steps and
rate of the second stage of ``benchmarks.quality``, the same batches in the same order, for every budget. A budget
that a method cannot reach is answered by the smallest network within its limits, once.

Latency is then measured, in turns with the dense network: one image, one thread, its processor time; the median of
three such measurements counts. ONNX Runtime: widths are multiples of 8. Eager: any widths. Test scores are compared
at equal latency, by interpolation between the measured cuts of one seed, never beyond them.

Chosen beforehand, on validation with seed 1: how numbers of blocks are compared (``docs/results/depth.md``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.depth.curves import BUDGETS, EXECUTIONS, METHODS, TASKS
from benchmarks.depth.report import write
from benchmarks.quality.tasks import STAGE_RATES, Task, dense, make_task, score
from benchmarks.quality.training import fit, recalibrate
from lightning_prune import ChannelGraph, DepthSettings, LatencyTable, Limits, Plan, PruningPolicy
from lightning_prune.compensation.repair import cut_and_compensate_
from lightning_prune.criteria import Importance
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.latency.calibration import measured_ratio
from lightning_prune.pruning.block_scorer import BlockScorer
from lightning_prune.pruning.calibration import first_batches
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.step import importance_of
from lightning_prune.pruning.training import Training
from lightning_prune.selection.dense_sizes import DenseSizes

LIMITS, MULTIPLES = Limits(0.95), {"onnx": 8, "eager": 1}
STAGE, MEASUREMENTS = 1, 3
Job = tuple[str, int, str, str, float]  # execution, seed, task, method, share of the latency


def execute(job: Job, size: str, networks: Path, tables: Path) -> Iterator[Row]:
    """Yield the row of one cut; none if the budget before it was out of reach already."""
    execution, seed, name, method, share = job
    task = make_task(name, size)
    network = dense(task, seed, networks).to(memory_format=torch.contiguous_format).eval()
    table = LatencyTable(tables, execution=execution, threads=1)  # type: ignore[arg-type]
    row = dict(zip(("execution", "seed", "task", "method", "budget"), job, strict=True))
    cut = Cut(network, task, table, method == METHODS[1])
    graph, plan = cut.plan(share)
    before = BUDGETS.index(share) - 1
    if not plan.reached and before >= 0 and not cut.plan(BUDGETS[before])[1].reached:
        yield row | {"beyond": True}
        return
    dense_score = score(network, task, task.data.test)
    ratios = [
        measured_ratio(graph, table.place, plan.remove.tolist(), plan.blocks) for _ in range(MEASUREMENTS)
    ]
    cut_and_compensate_(network, graph, plan.remove, cut.batches, blocks=plan.blocks)
    after_cut = score(network, task, task.data.test)
    fit(network, task.data.train, task.stage_steps[STAGE], task.batch, STAGE_RATES[STAGE], seed=seed)
    recalibrate(network, task.data.train, task.batch)
    trained = score(network, task, task.data.test)
    yield row | {
        "reached": plan.reached,
        "blocks": list(plan.blocks),
        "macs": round(plan.costs["macs"].share, 4),
        "predicted": round(plan.costs["latency"].share, 4),
        "measured": [round(ratio, 4) for ratio in ratios],
        "latency": round(median(ratios), 4),
        "dense_milliseconds": round(graph.cost("latency") / 1e6, 4),
        **{
            key: vars(each)
            for key, each in (("dense", dense_score), ("cut", after_cut), ("trained", trained))
        },
    }


class Cut:
    """Plans for one network, with or without residual blocks that vanish."""

    def __init__(self, network: nn.Module, task: Task, table: LatencyTable, depth: bool) -> None:
        self.network, self.task, self.table, self.depth = network, task, table, depth
        self.batches, self.example = task.calibration_batches(), task.example.contiguous()
        self.scorer = BlockScorer(DepthSettings(), partial(first_batches, self.batches))

    def policy(self, share: float) -> PruningPolicy:
        """Return the rules for a share of the latency."""
        return PruningPolicy(
            {"latency": share},
            limits=LIMITS,
            channel_multiple=MULTIPLES[self.table.execution],
            resources={"latency": self.table},
            depth=DepthSettings(max_depth_ratio=1) if self.depth else None,
        )

    def trace(self, network: nn.Module) -> ChannelGraph:
        """Trace the network, or a copy of it."""
        return self.policy(1).trace(network, ((self.example,), {}))

    def parts(
        self, share: float
    ) -> tuple[PruningPolicy, ChannelGraph, Importance, Mapping[str, float], DenseSizes]:
        """Return all that a plan is made of; no scores of blocks if none may vanish."""
        policy, graph, criterion = self.policy(share), self.trace(self.network), default_criterion()
        training = Training(self.batches, lambda net, batch: net(batch[0]), lambda net: 0.0)
        statistics = collect_statistics(criterion, self.network, graph, self.batches, training)
        importance, sizes = importance_of(criterion, graph, self.network, statistics), DenseSizes.of(graph)
        return policy, graph, importance, self.scorer(graph) if self.depth else {}, sizes

    def plan(self, share: float) -> tuple[ChannelGraph, Plan]:
        """Return the graph, and the plan for a share of the latency; nearest to it if the limits end it before."""
        policy, graph, importance, scores, sizes = self.parts(share)
        return graph, policy.plan(graph, importance, sizes, scores, partial(self.scorer.change, graph))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and write its page."""
    parser = study_parser("depth", __doc__ or "")
    parser.set_defaults(seeds=[1, 2, 3, 4, 5])
    parser.add_argument("--executions", nargs="+", default=list(EXECUTIONS), choices=list(EXECUTIONS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--networks", type=Path, default=None, help="folder of trained dense networks")
    options = parser.parse_args(arguments)
    size = "small" if options.small else "study"
    if not options.report:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        todo = jobs(options.executions, options.seeds, options.tasks, METHODS, BUDGETS, part=options.part)
        networks = options.networks or options.folder / "dense"
        run = partial(execute, size=size, networks=networks, tables=options.folder / "tables")
        study(todo, options.folder, options.part, run, _job_of)
    write([*finished(options.folder), *finished(options.folder / "numbers")], options.docs)


def _job_of(row: Row) -> Job:
    return row["execution"], row["seed"], row["task"], row["method"], row["budget"]


if __name__ == "__main__":
    main()
