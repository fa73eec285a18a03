"""Does training go on after cuts, whatever it is combined with?

    python -m benchmarks.robustness.combinations            # every combination
    python -m benchmarks.robustness.combinations --pairs    # few, in which every pair of settings occurs

A tiny network is trained and pruned twice in each combination of optimizer, ``carry`` or ``reset``, precision,
``torch.compile``, gradient accumulation, moving average, and one or two processes (gloo). After every cut the
loss must go on falling, every parameter must move, and every tensor of the optimizer's state must have the shape of
its parameter; ranks must hold the same weights, and averages the network's shapes. Writes ``combinations.md``.
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
from benchmarks.robustness.combination_run import (
    CUTS,
    EPOCHS,
    OPTIMIZERS,
    PRECISIONS,
    Combination,
    Outcome,
    run,
)


def everything() -> list[Combination]:
    """The product of all settings that this machine has."""
    settings = {
        "optimizer": list(OPTIMIZERS),
        "state": ["carry", "reset"],
        "precision": [p for p in PRECISIONS if p != "16-mixed" or torch.cuda.is_available()],
        "compiled": [False, True],
        "accumulate": [1, 4],  # six batches: the last step of an epoch is a smaller one
        "averaged": [False, True],
        "processes": [1, 2],
    }
    rows = [Combination(*values) for values in product(*settings.values())]
    return [row for row in rows if row.precision != "16-mixed" or row.processes == 1]


def pairs(rows: Sequence[Combination]) -> list[Combination]:
    """A few of ``rows`` in which every pair of settings of theirs occurs, greedily.

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


def measure(rows: Iterable[Combination], backend: str) -> list[tuple[Combination, Outcome]]:
    """Run combinations one after the other; what one raises is its outcome."""
    warnings.filterwarnings("ignore")
    found = []
    for row in rows:
        try:
            outcome = run(row, backend)
        except Exception as error:
            if row.processes > 1:  # the other process would wait
                raise
            outcome = Outcome([f"{type(error).__name__}: {error}"], [], [])
        print(f"{'wrong' if outcome.wrong else 'right'}  {row}  {'; '.join(outcome.wrong)}", flush=True)
        found.append((row, outcome))
    return found


def distributed(rows: Sequence[Combination], backend: str) -> list[tuple[Combination, Outcome]]:
    """:func:`measure` in two processes over gloo."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        free.close()
        asked, answer = Path(folder) / "rows.json", Path(folder) / "found.json"
        asked.write_text(json.dumps([asdict(row) for row in rows]))
        command = [
            sys.executable,
            "-m",
            "benchmarks.robustness.combinations",
            "--worker",
            folder,
            "--backend",
            backend,
        ]
        environments = [
            {**os.environ, **cluster, "NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in (0, 1)
        ]
        quiet = subprocess.DEVNULL
        workers = [
            subprocess.Popen(command, env=env, stderr=quiet, stdout=quiet if rank else None)
            for rank, env in enumerate(environments)
        ]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise RuntimeError("a distributed run failed; the last combination printed is the one before it")
        return [(Combination(**row), Outcome(**outcome)) for row, outcome in json.loads(answer.read_text())]


def work(folder: Path, backend: str) -> None:
    """What each of the two processes does."""
    rows = [Combination(**row) for row in json.loads((folder / "rows.json").read_text())]
    found = measure(rows, backend)
    if os.environ["LOCAL_RANK"] == "0":
        (folder / "found.json").write_text(json.dumps([[asdict(row), asdict(o)] for row, o in found]))


def page(found: Sequence[tuple[Combination, Outcome]], how: str) -> str:
    """The table as Markdown."""
    right = sum(not outcome.wrong for _, outcome in found)
    names = [field.name for field in fields(Combination)]
    devices = "CPU and GPU" if torch.cuda.is_available() else "CPU"
    head = [*names, "loss at first, after each cut, at the end", "MACs left", "wrong"]
    lines = [
        "# Combinations",
        "",
        f"{time.strftime('%Y-%m-%d')} · torch {versions()['torch']} · {devices}. Made by `{how}`.",
        "",
        f"**{right} of {len(found)} combinations are right**: after every cut the loss goes on falling, to below "
        "where the last one found it; every parameter moves in every epoch; every tensor of the optimizer's state "
        "has its parameter's shape; ranks hold the same weights; averages have the network's shapes.",
        "",
        f"| {' | '.join(head)} |",
        "|" + ":--|" * len(head),
        *(_line(row, outcome) for row, outcome in found),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Combination, outcome: Outcome) -> str:
    shown = [
        "yes" if value is True else "no" if value is False else str(value) for value in asdict(row).values()
    ]
    marks = (0, *(epoch + 1 for epoch in CUTS), EPOCHS - 1)
    losses = " → ".join(f"{outcome.losses[mark]:.3f}" for mark in marks if mark < len(outcome.losses))
    shares = ", ".join(f"{share:.0%}" for share in outcome.shares)
    return f"| {' | '.join([*shown, losses, shares, '; '.join(outcome.wrong)])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run them and write ``combinations.md``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness.combinations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--pairs", action="store_true", help="few combinations, with every pair of settings")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.worker:
        work(asked.worker, asked.backend)
        return
    rows = pairs(everything()) if asked.pairs else everything()
    found = measure([row for row in rows if row.processes == 1], asked.backend)
    found += distributed([row for row in rows if row.processes == 2], asked.backend)
    how = "python -m benchmarks.robustness.combinations" + (" --pairs" if asked.pairs else "")
    asked.docs.mkdir(parents=True, exist_ok=True)
    (asked.docs / "combinations.md").write_text(page(found, how))
    if any(outcome.wrong for _, outcome in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
