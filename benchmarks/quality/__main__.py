"""Which method keeps most of a network, at 50, 26, 10 and 5 % of its MACs, with and without repair?

    python -m benchmarks.quality                      # everything; start it once for each core
    python -m benchmarks.quality --long               # the default, a thin network and distillation, trained longer
    python -m benchmarks.quality --report             # only write docs/results/quality.md and its pictures again
    python -m benchmarks.quality --larger --device cuda --folder outputs/quality-larger

Each run is a file in ``runs/`` of the folder and is not repeated, so the command can be stopped and started again; a
second process takes the runs that the first has not begun. Without options, the most telling runs come first.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.studies import study_parser
from benchmarks.quality.chain import NAMES, run
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import CORE, DENSE, DISTILLED, ENERGY, LONG, PEERS, PUBLISHED, THIN
from benchmarks.quality.report import write
from benchmarks.quality.tasks import TASKS, Task, make_task
from lightning_prune.utils.atomic import atomic_write

Job = tuple[str, str, int, bool]  # task, method, seed, repair
#: further rows, the most telling first
MORE = (
    *DISTILLED,
    *ENERGY,
    *PEERS,
    "output Taylor",
    "Taylor",
    *PUBLISHED,
    "slimming",
    "NetAdapt",
    "uniform L1",
)


def repairs(method: str) -> tuple[bool, ...]:
    """Return with which settings of the repair a method runs."""
    return METHODS[method].repairs if method in METHODS else (False,)


def ordered(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """Yield all runs, the most telling first, in turn over seeds and tasks; some are yielded several times."""
    repaired, plain = [(name, True) for name in CORE], [(name, False) for name in CORE]
    more = [(name, repairs(name)[0]) for name in MORE]
    everything = [(name, repair) for name in NAMES for repair in repairs(name)]
    blocks: tuple[tuple[list[tuple[str, bool]], int], ...] = (
        ([*repaired, *plain[:4], (THIN, False)], 1),
        ([*repaired, *plain[:4]], 2),
        ([*((name, True) for name in DISTILLED), (DENSE, False)], 1),
        (more, 1),
        ([*repaired, *plain[:4]], 3),
        ([*((name, True) for name in DISTILLED), (THIN, False), (DENSE, False)], 2),
        ([*repaired, *plain[:4], *((name, True) for name in DISTILLED), (THIN, False)], 5),
        (everything, 2),
        (everything, 5),
    )
    for block, count in blocks:
        for seed, (method, repair), task in itertools.product(seeds[:count], block, tasks):
            if method in methods and repair in repairs(method) and runs_on(method, task):
                yield task, method, seed, repair


def longer(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    """Yield the runs with longer training."""
    for seed, method, task in itertools.product(seeds, LONG, tasks):
        for repair in repairs(method) if method in methods else ():
            yield task, method, seed, repair


def runs_on(method: str, task: str) -> bool:
    """Return whether a method fits a task: CWD compares maps, and a classifier has none."""
    return not (method.endswith("CWD") and task == "fashion")


def path_of(job: Job, folder: Path) -> Path:
    """Return the file of a run."""
    task, method, seed, repair = job
    name = "".join(letter if letter.isalnum() else "-" for letter in method)
    return folder / "runs" / f"{task}_{name}_{seed}_{'repaired' if repair else 'plain'}.json"


def finished(folder: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def execute(job: Job, task: Task, folder: Path) -> None:
    """Run a job and write its file, unless it is there or another process is at work on it."""
    path = path_of((task.name, *job[1:]), folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if path.is_file():
            return
        row = run(task, *job[1:], folder)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(row))
    shown = " ".join(f"{stage['trained']['test']['value']:.3f}" for stage in row["stages"])
    print(*job, f"dense {row['dense']['test']['value']:.3f}:", shown, f"{row['seconds']:.0f} s", flush=True)


def attempt(job: Job, task: Task, folder: Path) -> bool:
    """Run a job; after an error print it and return False, so that the other runs go on."""
    try:
        execute(job, task, folder)
    except Exception:
        print(*job, "failed:", traceback.format_exc(), flush=True)
        return False
    return True


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = study_parser("quality", __doc__)
    command.set_defaults(seeds=[1, 2, 3, 4, 5])
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    command.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    command.add_argument("--repair", choices=("with", "without", "both"), default="both")
    command.add_argument("--device", default="cpu")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--long", action="store_true", help="longer training, few methods")
    size.add_argument("--larger", action="store_true", help="sizes for a GPU")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if not args.report:
        size = "small" if args.small else "larger" if args.larger else "long" if args.long else "study"
        tasks = {name: make_task(name, size, args.device) for name in args.tasks}
        wanted = {"with": (True,), "without": (False,), "both": (True, False)}[args.repair]
        runs = longer if args.long else ordered
        chosen = [job for job in runs(args.tasks, args.methods, args.seeds) if job[3] in wanted]
        failed = [job for job in dict.fromkeys(chosen) if not attempt(job, tasks[job[0]], args.folder)]
        if failed:
            raise SystemExit(f"{len(failed)} runs failed, see above: {failed}")
    write(finished(args.folder), args.docs)


if __name__ == "__main__":
    main()
