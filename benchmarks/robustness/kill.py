"""Kill pruning runs by SIGKILL, SIGTERM and SIGINT, resume them in new processes, and compare the final states.

    python -m benchmarks.robustness.kill              # 100 kills; writes docs/results/kill.md
    python -m benchmarks.robustness.kill --kills 20   # only the first 20 of them, into the same files
    python -m benchmarks.robustness.kill --report     # kills nothing, writes the page from its JSON

Each kill is saved in ``docs/results/data/kill.json`` when it is done, and the same command continues after the last
one. The order is random, so that every number of kills is a mixture of all ways of pruning, signals, checkpoint
plugins and moments.

The run (:mod:`benchmarks.robustness.kill_run`) has all kinds of state that a resume must restore, and three
checkpoint callbacks. It is killed within surgery (some tensors cut, others not), while a checkpoint is written (half
of the file is there), in validation, and at random times. The final states must agree in every bit: weights, buffers,
optimizer, scheduler, the record, the cuts, and the state of the callback.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.robustness.kill_child import PLUGINS, POINTS, Kill, checkpointed, child
from benchmarks.robustness.kill_run import EPOCHS, PRUNINGS, Classifier, fit, same, shuffled
from lightning_prune.trainer.checkpoint_io import last_checkpoint

__all__ = ["Kill", "checkpointed", "killed", "plan", "section", "study", "undisturbed"]

COMMAND = "python -m benchmarks.robustness.kill"
KILLS = 100
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
ENDED = " (run had ended)"
STILL_RUNNING = 900.0  # seconds after which a run counts as stuck
#: Processes are forked from a server that has imported everything, but has trained nothing: torch needs that.
processes = multiprocessing.get_context("forkserver")


def plan(kills: int, seed: int = 0) -> list[Kill]:
    """Return the first ``kills`` kills: all combinations in a random order, over and over.

    Example:
        >>> first = plan(120)
        >>> len({(kill.prune, kill.signal, kill.plugin, kill.point) for kill in first}), plan(3) == first[:3]
        (120, True)
    """
    generator, every = random.Random(seed), list(itertools.product(PRUNINGS, SIGNALS, PLUGINS, POINTS))
    rounds = (generator.sample(every, len(every)) for _ in itertools.count())
    combinations = itertools.islice(itertools.chain.from_iterable(rounds), kills)
    return [
        Kill(number, *combination, random.Random(f"{seed} {number}").random())
        for number, combination in enumerate(combinations, start=1)
    ]


def start(folder: Path, prune: str, plugin: str, kill: Kill | None = None) -> BaseProcess:
    """Start a run in a process of its own, and return when its training begins."""
    processes.set_forkserver_preload(["benchmarks.robustness.kill_run", "lightning_prune.netadapt.workers"])
    started = processes.Event()
    run = processes.Process(target=child, args=(folder, kill, prune, plugin, started))
    run.start()
    started.wait(STILL_RUNNING)
    return run


def to_its_end(folder: Path, prune: str, plugin: str) -> tuple[Any, float]:
    """Start or resume a run in a process of its own; return its final state and the seconds it took.

    Raises:
        RuntimeError: it failed, or does not end.
    """
    run = start(folder, prune, plugin)
    start_time = time.monotonic()
    run.join(STILL_RUNNING)
    if run.exitcode != 0:
        run.kill()
        raise RuntimeError(f"the run in {folder} failed: exit code {run.exitcode}")
    return torch.load(folder / "final.pt", weights_only=True), time.monotonic() - start_time


def undisturbed(folder: Path, prune: str = "filters") -> dict[str, Any]:
    """Return the final state of an uninterrupted run in this process; ``folder`` is for the state of a search."""
    callbacks = PRUNINGS[prune]()
    return fit(Classifier(), shuffled(), callbacks, None, max_epochs=EPOCHS, default_root_dir=folder)


def killed(folder: Path, kill: Kill, seconds: float = 0) -> tuple[str, str]:
    """Start a run and kill it; return where it was killed, and the checkpoint to resume from.

    Args:
        folder: of the checkpoints.
        kill: how and when.
        seconds: duration of an uninterrupted run, the latest time to kill at.
    """
    run = start(folder, kill.prune, kill.plugin, kill)
    where = f"{kill.point}, call {kill.count}" if kill.count else f"after {kill.share * seconds:.2f} s"
    if not kill.count:
        time.sleep(kill.share * seconds)
        if run.pid is not None and run.is_alive():
            os.kill(run.pid, signal.Signals[kill.signal])
    run.join(STILL_RUNNING)
    if run.exitcode is None:
        run.kill()
        raise RuntimeError(f"the run in {folder} does not end after {kill.signal}")
    if (folder / "final.pt").exists():
        (folder / "final.pt").unlink()
        where += ENDED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = last_checkpoint(folder)
    return where, str(checkpoint.relative_to(folder)) if checkpoint else "the beginning"


def result(kill: Kill, expected: Any, seconds: float, parent: Path) -> dict[str, Any]:
    """Kill and resume one run; return a row of the table."""
    folder = parent / str(kill.number)
    where, source = killed(folder, kill, seconds)
    state, _ = to_its_end(folder, kill.prune, kill.plugin)
    return {**asdict(kill), "where": where, "source": source, "same": bool(same(state, expected))}


def study(kills: Sequence[Kill], files: ReportFiles) -> list[dict[str, Any]]:
    """Make those kills that have no result yet, save each, and return all results."""
    rows = files.runs()
    done = {row["number"] for row in rows}
    whole: dict[str, tuple[Any, float]] = {}
    with tempfile.TemporaryDirectory() as parent:
        for kill in kills:
            if kill.number in done:
                continue
            if kill.prune not in whole:
                folder = Path(parent) / f"whole {kill.prune}"
                whole[kill.prune] = to_its_end(folder, kill.prune, kill.plugin)
            rows.append(result(kill, *whole[kill.prune], Path(parent)))
            print(*rows[-1].values(), sep=" | ", flush=True)
            files.save_runs(rows)
    return rows


# -- the page ---------------------------------------------------------------------------------------------------


def section(content: dict[str, Any]) -> str:
    """Return what the page says about the results (Markdown)."""
    rows = content["runs"]
    good, ended = sum(row["same"] for row in rows), sum(ENDED in row["where"] for row in rows)
    lines = [
        f"`{COMMAND}` (torch {content['versions']['torch']}, CPU): {len(rows)} of {KILLS} kills were made, and "
        f"{good} of the {len(rows)} runs ended with the same bits. {ended} of them had ended before their "
        "signal came, and were resumed from their last checkpoint all the same.",
        "",
        "| pruning | " + " | ".join(SIGNALS) + " | with Lightning's checkpoint plugin | same bits |",
        "|:--|" + "--:|" * (len(SIGNALS) + 2),
    ]
    for prune in PRUNINGS:
        of_kind = [row for row in rows if row["prune"] == prune]
        numbers = [sum(row["signal"] == name for row in of_kind) for name in SIGNALS]
        lightnings = sum(row["plugin"] != "AtomicCheckpointIO" for row in of_kind)
        same_bits = f"{sum(row['same'] for row in of_kind)} of {len(of_kind)}"
        lines.append(f"| {prune} | {' | '.join(map(str, [*numbers, lightnings, same_bits]))} |")
    lines += [
        "",
        "| kill | pruning | signal | checkpoint plugin | where | resumed from | same bits at the end |",
        "|--:|:--|:--|:--|:--|:--|:--|",
    ]
    for row in sorted(rows, key=lambda row: row["number"]):
        cells = [row[key] for key in ("number", "prune", "signal", "plugin", "where", "source")]
        lines.append(f"| {' | '.join(map(str, cells))} | {'yes' if row['same'] else 'NO'} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("robustness.kill", __doc__)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"number of kills; default: {KILLS}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare, and write the page."""
    args = parse(arguments)
    files = ReportFiles("kill", args.docs)
    if not args.report:
        study(plan(args.kills), files)
    content = files.load()
    files.write_section("kills", section(content))
    if not all(row["same"] for row in content["runs"]):
        raise SystemExit("the final state of a resumed run differs")


if __name__ == "__main__":
    main()
