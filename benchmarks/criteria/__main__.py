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

import copy
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import torch

from benchmarks.common.studies import Row, arguments, finished, jobs, study
from benchmarks.criteria.methods import METHODS
from benchmarks.criteria.report import write
from benchmarks.criteria.tasks import TASKS, fit, score, trained

STAGES = (0.71, 0.5, 0.36, 0.26, 0.16, 0.10, 0.07, 0.05)
TESTED = (0.5, 0.26, 0.10, 0.05)
EPOCHS = {"brain": 5, "digits": 5}
Job = tuple[int, str, str]


def run(job: Job, folder: Path, small: bool) -> Iterator[Row]:
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
            print(*job, f"{share:.0%} {found['score']:.3f}", flush=True)


def job_of(row: Row) -> Job:
    return row["seed"], row["task"], row["method"]


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("criteria", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked = parser.parse_args(given)
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if not asked.report:
        todo = jobs(asked.seeds, asked.tasks, asked.methods, part=asked.part)
        study(todo, asked.folder, asked.part, lambda job: run(job, asked.folder, asked.small), job_of)
    write(finished(asked.folder), asked.docs)


if __name__ == "__main__":
    main()
