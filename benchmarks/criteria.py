"""Which criterion keeps most? Every criterion of ours, random, and torch-pruning's, under one protocol.

    python -m benchmarks.criteria                     # two tasks, three seeds; two hours on one thread
    python -m benchmarks.criteria --part 1/2          # one half of the runs, beside a second process with --part 2/2
    python -m benchmarks.criteria --report            # only docs/criteria_study.md, .json and .png of what is there

A run starts from the trained dense network of its seed. Eight times it cuts to the next share of the MACs (71, 50,
36, 26, 16, 10, 7, 5 %) and trains on with a fresh Adam, 1e-3 down a cosine to zero; at 50, 26, 10 and 5 % it is
tested. What a criterion wants to know it sees in the last epoch before the cut. "Dense" trains on as often,
uncut. At most 88 % of a layer's channels may go, in torch-pruning only where it says "limits". A run that is in
``runs*.jsonl`` is not repeated, so the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.criteria_methods import METHODS
from benchmarks.criteria_report import write
from benchmarks.criteria_tasks import TASKS, fit, score, trained

SEEDS = (0, 1, 2)
STAGES = (0.71, 0.5, 0.36, 0.26, 0.16, 0.10, 0.07, 0.05)
TESTED = (0.5, 0.26, 0.10, 0.05)
EPOCHS = {"brain": 5, "digits": 5}
Job = tuple[int, str, str]


def jobs(seeds: Sequence[int], tasks: Sequence[str], methods: Sequence[str], part: str = "1/1") -> list[Job]:
    """Seed by seed, so that an interrupted study has whole seeds; every n-th of them."""
    number, of = map(int, part.split("/"))
    return list(product(seeds, tasks, methods))[number - 1 :: of]


def finished(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("runs*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def run(job: Job, folder: Path, small: bool) -> Iterator[dict[str, Any]]:
    """One row per share that is tested."""
    seed, name, which = job
    task = copy.deepcopy(trained(name, seed, folder, small))
    L.seed_everything(seed, workers=True, verbose=False)
    method = METHODS[which](task, seed)
    start = time.process_time()
    fit(task, 1, method.callbacks(), lr=0.0)  # a criterion sees the trained network, which stays as it is
    for share in STAGES:
        left = method.cut(share)
        fit(task, 1 if small else EPOCHS[name], method.callbacks())
        if share in TESTED:
            found = {"budget": share, "macs": left, "score": score(task), "cpu": time.process_time() - start}
            yield {"seed": seed, "task": name, "method": which, **found}


def study(todo: Sequence[Job], folder: Path, part: str, small: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"runs-{part.replace('/', '-of-')}.jsonl"
    for job in todo:
        if job in {(row["seed"], row["task"], row["method"]) for row in finished(folder)}:
            continue
        rows = list(run(job, folder, small))
        with file.open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        print(job, " ".join(f"{row['budget']:.0%} {row['score']:.3f}" for row in rows), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteria", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n processes")
    parser.add_argument("--folder", type=Path, default=Path("outputs/criteria"), help="of runs and networks")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--small", action="store_true", help="seconds a run, for a test of the command itself")
    asked = parser.parse_args(arguments)
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if not asked.report:
        study(jobs(asked.seeds, asked.tasks, asked.methods, asked.part), asked.folder, asked.part, asked.small)
    write(finished(asked.folder), asked.docs)


if __name__ == "__main__":
    main()
