"""Compare all criteria, random, and those of torch-pruning under one protocol, on two tasks.

    python -m benchmarks.criteria                     # two tasks, three seeds; two hours on one thread
    python -m benchmarks.criteria --part 1/2          # half of the runs; start --part 2/2 as a second process
    python -m benchmarks.criteria --report            # only write docs/results/criteria.md and its picture again

Each run starts from the trained dense network of its seed. Eight times it is cut to the next share of the MACs (71,
50, 36, 26, 16, 10, 7, 5 %) and trained further with a new Adam, its learning rate falling from 1e-3 to zero along a
cosine. It is tested at 50, 26, 10 and 5 %. A criterion collects its statistics in the last epoch before a cut.
"Dense" is trained for the same epochs without a cut. At most 88 % of a layer's channels are removed; in torch-pruning
only where the name says "limits". Runs in ``runs*.jsonl`` are not repeated, so the command can be stopped and started
again.
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

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.criteria.methods import METHODS
from benchmarks.criteria.report import write
from benchmarks.criteria.tasks import TASKS, fit, score, trained

STAGES = (0.71, 0.5, 0.36, 0.26, 0.16, 0.10, 0.07, 0.05)
TESTED = (0.5, 0.26, 0.10, 0.05)
EPOCHS = {"brain": 5, "digits": 5}
Job = tuple[int, str, str]  # seed, task, method


def run(job: Job, folder: Path, small: bool) -> Iterator[Row]:
    """Run one method on one task; yield a row for each share of the MACs that is tested."""
    seed, name, method_name = job
    task = copy.deepcopy(trained(name, seed, folder, small))
    L.seed_everything(seed, workers=True, verbose=False)
    method = METHODS[method_name](task, seed)
    start = time.process_time()
    # One epoch with learning rate zero: the criterion collects statistics of the trained, unchanged network.
    fit(task, 1, method.callbacks(), lr=0.0)
    for share in STAGES:
        macs = method.cut(share)
        fit(task, 1 if small else EPOCHS[name], method.callbacks())
        if share in TESTED:
            result = {"budget": share, "macs": macs, "score": score(task), "cpu": time.process_time() - start}
            yield {"seed": seed, "task": name, "method": method_name, **result}
            print(*job, f"{share:.0%} {result['score']:.3f}", flush=True)


def job_of(row: Row) -> Job:
    return row["seed"], row["task"], row["method"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("criteria", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args(arguments)
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if not args.report:
        todo = jobs(args.seeds, args.tasks, args.methods, part=args.part)
        study(todo, args.folder, args.part, lambda job: run(job, args.folder, args.small), job_of)
    write(finished(args.folder), args.docs)


if __name__ == "__main__":
    main()
