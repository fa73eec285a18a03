"""Check that training continues correctly after cuts, in combinations of optimizers and trainer settings.

    python -m benchmarks.robustness.combinations            # all combinations
    python -m benchmarks.robustness.combinations --pairs    # a few that contain every pair of settings

A tiny network is trained and pruned twice in each combination of optimizer, ``carry`` or ``reset``, precision,
``torch.compile``, gradient accumulation, moving average, and one or two processes (gloo). After each cut the loss
must fall, every parameter must change, and every tensor of the optimizer's state must have the shape of its
parameter; ranks must have the same weights, and averages the network's shapes. Writes
``docs/results/combinations.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from itertools import combinations, product
from pathlib import Path

import torch

from benchmarks.common.machine import versions
from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.robustness.combination_run import (
    CUTS,
    EPOCHS,
    OPTIMIZERS,
    PRECISIONS,
    Combination,
    Outcome,
    run,
)

COMMAND = "python -m benchmarks.robustness.combinations"
Result = tuple[Combination, Outcome]


def everything() -> list[Combination]:
    """Return the product of all settings that this machine supports."""
    settings = {
        "optimizer": list(OPTIMIZERS),
        "state": ["carry", "reset"],
        "precision": [p for p in PRECISIONS if p != "16-mixed" or torch.cuda.is_available()],
        "compiled": [False, True],
        "accumulate": [1, 4],  # of six batches per epoch, so that the last step has fewer
        "averaged": [False, True],
        "processes": [1, 2],
    }
    rows = [Combination(*values) for values in product(*settings.values())]
    return [row for row in rows if row.precision != "16-mixed" or row.processes == 1]


def pairs(rows: Sequence[Combination]) -> list[Combination]:
    """Return a few of ``rows`` that contain every pair of their settings, chosen greedily.

    Example:
        >>> few = pairs(everything())
        >>> len(few) < 60
        True
    """
    sets = {row: set(combinations(asdict(row).items(), 2)) for row in rows}
    missing, chosen = set().union(*sets.values()), []
    while missing:
        best = max(rows, key=lambda row: len(sets[row] & missing))
        chosen.append(best)
        missing -= sets[best]
    return chosen


def measure(rows: Iterable[Combination], backend: str) -> list[Result]:
    """Run combinations one after the other; an exception of a run becomes its outcome."""
    warnings.filterwarnings("ignore")
    results = []
    for row in rows:
        try:
            outcome = run(row, backend)
        except Exception as error:
            if row.processes > 1:  # the other process would wait for ever
                raise
            outcome = Outcome([f"{type(error).__name__}: {error}"], [], [])
        print(f"{'wrong' if outcome.wrong else 'right'}  {row}  {'; '.join(outcome.wrong)}", flush=True)
        results.append((row, outcome))
    return results


def distributed(rows: Sequence[Combination], backend: str) -> list[Result]:
    """Run :func:`measure` in two processes over gloo, and return the results of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        workers = [start_worker(folder, backend, cluster, rank) for rank in (0, 1)]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise RuntimeError("a distributed run failed: the one after the last combination printed")
        results = json.loads((Path(folder) / "results.json").read_text())
        return [(Combination(**row), Outcome(**outcome)) for row, outcome in results]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_worker(folder: str, backend: str, cluster: dict[str, str], rank: int) -> subprocess.Popen[bytes]:
    """Start one of the two processes; only rank 0 prints."""
    command = [sys.executable, *COMMAND.split()[1:], "--worker", folder, "--backend", backend]
    environment = {**os.environ, **cluster, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    output = subprocess.DEVNULL if rank else None
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=output)


def work(folder: Path, backend: str) -> None:
    """Run the combinations of ``rows.json`` in one of the two processes; rank 0 writes ``results.json``."""
    rows = [Combination(**row) for row in json.loads((folder / "rows.json").read_text())]
    results = measure(rows, backend)
    if os.environ["LOCAL_RANK"] == "0":
        content = [[asdict(row), asdict(outcome)] for row, outcome in results]
        (folder / "results.json").write_text(json.dumps(content))


def page(results: Sequence[Result], command: str) -> str:
    """Return the page (Markdown)."""
    right = sum(not outcome.wrong for _, outcome in results)
    names = [field.name for field in fields(Combination)]
    devices = "CPU and GPU" if torch.cuda.is_available() else "CPU"
    columns = [*names, "loss at the start, after each cut, at the end", "MACs left", "errors"]
    lines = [
        "# Combinations",
        "",
        f"{time.strftime('%Y-%m-%d')} · torch {versions()['torch']} · {devices}. Made by `{command}`.",
        "",
        f"**{right} of {len(results)} combinations are right**: after each cut the loss falls, and it ends below the "
        "loss before the last cut; every parameter changes in every epoch; every tensor of the optimizer's state has "
        "the shape of its parameter; ranks have the same weights; averages have the network's shapes.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + ":--|" * len(columns),
        *(_line(row, outcome) for row, outcome in results),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Combination, outcome: Outcome) -> str:
    yes_no = {True: "yes", False: "no"}
    settings = [yes_no[v] if isinstance(v, bool) else str(v) for v in asdict(row).values()]
    epochs = (0, *(epoch + 1 for epoch in CUTS), EPOCHS - 1)
    losses = " → ".join(f"{outcome.losses[epoch]:.3f}" for epoch in epochs if epoch < len(outcome.losses))
    shares = ", ".join(f"{share:.0%}" for share in outcome.shares)
    return f"| {' | '.join([*settings, losses, shares, '; '.join(outcome.wrong)])} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", action="store_true", help="a few combinations with every pair of settings")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    parser.add_argument("--docs", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the combinations and write the page; exit with 1 if one is wrong."""
    args = parse(arguments)
    torch.set_num_threads(1)
    if args.worker:
        work(args.worker, args.backend)
        return
    rows = pairs(everything()) if args.pairs else everything()
    results = measure([row for row in rows if row.processes == 1], args.backend)
    results += distributed([row for row in rows if row.processes == 2], args.backend)
    command = COMMAND + (" --pairs" if args.pairs else "")
    ReportFiles("combinations", args.docs).write_page(page(results, command))
    if any(outcome.wrong for _, outcome in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
