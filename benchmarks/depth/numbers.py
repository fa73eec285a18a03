"""How well is the number of vanishing blocks chosen? ``python -m benchmarks.depth.numbers``, on validation.

    python -m benchmarks.depth.numbers    # all numbers of blocks, for some budgets, with seed 1

For each budget in time and each number of blocks, a network is cut by the plan with that number. Four ways to choose
among those that meet the budget, without labels: sums of scores (``DepthSettings(compare="scores")``), and the change
of the outputs on images that nothing was fitted to, as the cut leaves the network, with its batch norms estimated
anew, and repaired (as ``compare="repaired"`` does). Beside them stands the score on validation after the repair, and
after the training of ``python -m benchmarks.depth``, whose page shows the result.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.depth.__main__ import STAGE, Cut
from benchmarks.depth.number_report import CASES, NUMBER_BUDGETS
from benchmarks.depth.report import write
from benchmarks.quality.tasks import STAGE_RATES, dense, make_task, score
from benchmarks.quality.training import fit, recalibrate
from lightning_prune import LatencyTable, Plan, prune_
from lightning_prune.compensation.repair import cut_and_compensate_
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.utils.batch_norm import recalibrate_

HELD_OUT = 64  # training images behind those that the repair is fitted to
Job = tuple[int, tuple[str, str], float]  # seed, task and execution, budget


def execute(job: Job, size: str, networks: Path, tables: Path) -> Iterator[Row]:
    """Yield a row for each number of blocks."""
    seed, (name, execution), share = job
    task = make_task(name, size)
    network = dense(task, seed, networks).to(memory_format=torch.contiguous_format).eval()
    cut = Cut(network, task, LatencyTable(tables, execution=execution, threads=1), depth=True)  # type: ignore[arg-type]
    images = task.data.train.images[task.calibration : task.calibration + HELD_OUT]
    row = {"seed": seed, "task": name, "execution": execution, "budget": share}
    policy, graph, importance, scores, sizes = cut.parts(share)
    assert policy.depth is not None
    by_scores = replace(policy, depth=replace(policy.depth, compare="scores"))
    number = len(by_scores.plan(graph, importance, sizes, scores).blocks)
    for blocks in range(len(blocks_of(graph)) + 1):
        fixed = replace(policy, depth=replace(policy.depth, blocks=blocks))
        plan = fixed.plan(graph, importance, sizes, scores)
        changes = _changes(network, cut, plan, images)
        yield row | {"blocks": blocks, "reached": plan.reached, "scores": blocks == number, **changes}


def _changes(network: nn.Module, cut: Cut, plan: Plan, images: Tensor) -> Row:
    """Return how far copies are off after the cut, and how well they do after repair and training."""
    task, change = cut.task, partial(_change, network, images)
    copied = copy.deepcopy(network)
    prune_(copied, cut.trace(copied), plan.remove, blocks=plan.blocks)
    row: Row = {"as it is": change(copied)}
    recalibrate_(copied, [((batch[0],), {}) for batch in cut.batches])
    row["norms anew"] = change(copied)
    copied = copy.deepcopy(network)
    cut_and_compensate_(copied, cut.trace(copied), plan.remove, cut.batches, blocks=plan.blocks)
    row |= {"repaired": change(copied), "cut": score(copied, task, task.data.val).value}
    fit(copied, task.data.train, task.stage_steps[STAGE], task.batch, STAGE_RATES[STAGE], seed=0)
    recalibrate(copied, task.data.train, task.batch)
    return row | {"trained": score(copied, task, task.data.val).value}


@torch.no_grad()
def _change(dense: nn.Module, images: Tensor, network: nn.Module) -> float:
    before, after = dense.eval()(images), network.eval()(images)
    return round(float((before - after).square().mean() / before.var(correction=0)), 5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all numbers of blocks, and write the numbers; the page is written by ``benchmarks.depth``."""
    parser = study_parser("depth.numbers", __doc__ or "")
    parser.set_defaults(seeds=[1], folder=Path("outputs") / "depth")
    parser.add_argument("--networks", type=Path, default=None, help="folder of trained dense networks")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    networks, tables = options.networks or options.folder / "dense", options.folder / "tables"
    run = partial(execute, size="small" if options.small else "study", networks=networks, tables=tables)
    folder = options.folder / "numbers"
    todo = [] if options.report else jobs(options.seeds, CASES, NUMBER_BUDGETS, part=options.part)
    study(todo, folder, options.part, run, _job_of)
    write([*finished(options.folder), *finished(folder)], options.docs)


def _job_of(row: Row) -> Job:
    return row["seed"], (row["task"], row["execution"]), row["budget"]


if __name__ == "__main__":
    main()
