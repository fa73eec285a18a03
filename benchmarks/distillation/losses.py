"""Compare losses and weights of distillation after one repaired cut, on the tasks of ``benchmarks.quality``.

    python -m benchmarks.distillation.losses --folder FOLDER                       # brain slices at 10 %, three seeds
    python -m benchmarks.distillation.losses --folder FOLDER --seeds 1 2 3 4 5 --budget 0.26
    python -m benchmarks.distillation.losses --folder FOLDER --gradients           # only the sizes of the losses

Each run cuts the same dense network by LAMP, repairs it, and trains it with the task's loss plus one distillation
loss, with the dense network as the teacher. Rows in ``losses.jsonl`` of the folder are not repeated. A table of
paired differences to training without a teacher is printed, with intervals of 95 % (Student's t over the seeds).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import intervals
from benchmarks.quality.tasks import STAGE_RATES, TASKS, Task, dense, make_task, score
from benchmarks.quality.training import LogitLoss, batches_of, cross_entropy, distilled, fit, recalibrate
from lightning_prune import Limits, PruningPolicy, one_shot
from lightning_prune.compensation import CompensationSettings
from lightning_prune.criteria import LAMP
from lightning_prune.distillation import cwd, dist, hinton, standardised

Row = dict[str, Any]

#: name -> loss of ``(student, teacher)`` logits and its weight; None: without a teacher
VARIANTS: dict[str, tuple[LogitLoss, float] | None] = {
    "none": None,
    "hinton, T 4": (lambda student, teacher: hinton(student, teacher, 4.0), 1.0),
    "hinton, T 1": (lambda student, teacher: hinton(student, teacher, 1.0), 1.0),
    "cwd, weight 3": (cwd, 3.0),
    "cwd, weight 0.3": (cwd, 0.3),
    "dist": (dist, 1.0),
    "standardised": (standardised, 1.0),
}


def cut(task: Task, net: nn.Module, budget: float) -> None:
    """Cut a network to its budget by LAMP, and repair it."""
    policy = PruningPolicy.of({"macs": budget}, limits=Limits(layers=0.95))
    one_shot(
        net,
        task.example,
        policy,
        LAMP(),
        batches=task.calibration_batches(),
        compensate=CompensationSettings(),
    )


def gradients(task: Task, seed: int, budget: float, folder: Path) -> Row:
    """Return for each variant the gradient's norm, weight included, as a share of the task loss's, after the cut."""
    teacher, net = dense(task, seed, folder).eval(), dense(task, seed, folder)
    cut(task, net, budget)
    net.train()
    images, targets = next(batches_of(task.data.train, task.batch, 1, seed))
    with torch.no_grad():
        target = teacher(images)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def norm(loss: Tensor) -> float:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return float(torch.cat([part.flatten() for part in parts if part is not None]).norm())

    logits = net(images)
    whole = norm(F.cross_entropy(logits, targets))
    terms = {name: chosen for name, chosen in VARIANTS.items() if chosen is not None}
    return {
        name: round(weight * norm(loss(logits, target)) / whole, 2) for name, (loss, weight) in terms.items()
    }


def run(task: Task, seed: int, budget: float, variant: str, steps: int, folder: Path) -> Row:
    """Return the row of one run: scores of the dense network, directly after the cut, and after the training."""
    teacher, net = dense(task, seed, folder), dense(task, seed, folder)
    cut(task, net, budget)
    start = score(net, task, task.data.test).value
    chosen = VARIANTS[variant]
    loss = cross_entropy if chosen is None else distilled(teacher, *chosen)
    fit(net, task.data.train, steps, task.batch, STAGE_RATES[0], seed, loss)
    recalibrate(net, task.data.train, task.batch)
    scores = {"dense": score(teacher, task, task.data.test).value, "cut": start}
    scores["trained"] = score(net, task, task.data.test).value
    return {"task": task.name, "seed": seed, "budget": budget, "variant": variant, "steps": steps, **scores}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval, see :func:`benchmarks.common.intervals.interval`.

    Example:
        >>> mean, half = interval([0.0, 1.0, 2.0])
        >>> mean, round(half, 3)
        (1.0, 2.484)
    """
    whole = intervals.interval(values)
    return whole.mean, whole.high - whole.mean


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table; rows are those of one task, budget and number of steps."""
    by_variant = {name: {row["seed"]: row for row in rows if row["variant"] == name} for name in VARIANTS}
    none, lines = by_variant["none"], ["| loss | score | difference to none | 95 % |", "|:--|--:|--:|--:|"]
    for name, runs in by_variant.items():
        if not runs:
            continue
        mean = statistics.fmean(row["trained"] for row in runs.values())
        pairs = [runs[seed]["trained"] - none[seed]["trained"] for seed in runs.keys() & none.keys()]
        gain, half = interval(pairs) if len(pairs) > 1 and name != "none" else (0.0, float("nan"))
        lines.append(f"| {name} ({len(runs)}) | {mean:.4f} | {gain:+.4f} | {half:.4f} |")
    some = next(iter(none.values()))
    lines.append(f"\nSeed {some['seed']}: dense {some['dense']:.4f}, after the cut {some['cut']:.4f}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="dense networks and rows")
    parser.add_argument("--task", choices=TASKS, default="brain")
    parser.add_argument("--size", default="study", help="size of the task, see benchmarks.quality")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--budget", type=float, default=0.10)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--gradients", action="store_true", help="print sizes of gradients, and do not train")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args(arguments)
    task, path = make_task(args.task, args.size), args.folder / "losses.jsonl"
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.gradients:
        for seed in args.seeds:
            print(seed, gradients(task, seed, args.budget, args.folder), flush=True)
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    same = {"task": task.name, "budget": args.budget, "steps": args.steps}
    for seed in args.seeds:
        for variant in args.variants:
            wanted = {**same, "seed": seed, "variant": variant}
            if any(wanted.items() <= row.items() for row in rows):
                continue
            rows.append(run(task, seed, args.budget, variant, args.steps, args.folder))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    print(table([row for row in rows if same.items() <= row.items()]))


if __name__ == "__main__":
    main()
