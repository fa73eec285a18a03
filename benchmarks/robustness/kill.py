"""Kill a pruning run with ``kill -9``, resume it in a new process, and compare with a run without interruption.

    python -m benchmarks.robustness.kill                     # twenty kills; writes docs/results/kill.md; five minutes
    python -m benchmarks.robustness.kill --prune slimming    # the same with SlimmingCallback, into the same page
    python -m benchmarks.robustness.kill --prune averaged    # slimming with a moving average of the weights
    python -m benchmarks.robustness.kill --prune rounds      # NetAdapt
    python -m benchmarks.robustness.kill --kills 3 --seed 5  # prints its table only

The run (:mod:`benchmarks.robustness.kill_run`) has all kinds of state that a resume must restore, and three
checkpoint callbacks. It is killed within surgery (some tensors cut, others not), while a checkpoint is written (half
of the file is there), in validation, and at random times. The final states must agree in every bit: weights, buffers,
optimizer, scheduler, the record, the cuts, and the state of the callback.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.robustness.kill_run import BATCHES, EPOCHS, PRUNINGS, Classifier, fit, same, shuffled
from lightning_prune.surgery import prune as surgery
from lightning_prune.trainer.checkpoint_io import last_checkpoint

ROOT = Path(__file__).parents[2]
COMMAND = "python -m benchmarks.robustness.kill"
KILLS = {"filters": 20, "slimming": 8, "averaged": 4, "rounds": 8}
POINTS = ("surgery", "writing", "validation", "anywhere")
MAX_COUNTS = {"surgery": 20, "writing": 30, "validation": EPOCHS * BATCHES, "anywhere": 0}


# -- the process that is killed ---------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    """End this process as ``kill -9`` does: without handlers and clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(checkpoint: Any, file: Any) -> None:
    """Write half of a checkpoint, then die."""
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    die()


save = torch.save  # the original: `arm` replaces torch.save


def arm(point: str, count: int) -> None:
    """Die at the ``count``-th call of the function that belongs to ``point``."""
    owner: Any
    owner, name, end = {
        "surgery": (surgery, "set_data", die),
        "writing": (torch, "save", write_half),
        "validation": (Classifier, "validation_step", die),
    }[point]
    original, calls_left = getattr(owner, name), count

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls_left
        calls_left -= 1
        return end(*args) if calls_left == 0 else original(*args, **kwargs)

    setattr(owner, name, counted)


def checkpointed(folder: Path, prune: str = "filters") -> dict[str, Any]:
    """Train with checkpoints in ``folder``, from the last complete one if there is one; return the final state."""
    checkpoints = [
        ModelCheckpoint(folder / "steps", every_n_train_steps=2),
        ModelCheckpoint(folder / "validated", save_on_train_epoch_end=False),
        ModelCheckpoint(folder / "epochs", save_on_train_epoch_end=True, every_n_epochs=2),
    ]
    callbacks, resume = [*PRUNINGS[prune](), *checkpoints], last_checkpoint(folder)
    return fit(Classifier(), shuffled(), callbacks, resume, max_epochs=EPOCHS, default_root_dir=folder)


def child(prune: str, folder: Path, point: str, count: int) -> None:
    """Train, and die at ``point``, or write the final state."""
    if point in POINTS[:3]:
        arm(point, count)
    print("training", flush=True)
    save(checkpointed(folder, prune), folder / "final.pt")


# -- the process that kills -------------------------------------------------------------------------------------


def start(prune: str, folder: Path, point: str = "", count: int = 0) -> subprocess.Popen[str]:
    """Start a run in a process of its own, and return when its training begins."""
    command = [sys.executable, "-W", "ignore", *COMMAND.split()[1:], "--prune", prune]
    command += ["--child", str(folder), point, str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert run.stdout is not None
    with run.stdout as lines:
        lines.readline()
    return run


def undisturbed(folder: Path, prune: str = "filters") -> dict[str, Any]:
    """Return the final state of an uninterrupted run in this process; ``folder`` is for the state of a search."""
    callbacks = PRUNINGS[prune]()
    return fit(Classifier(), shuffled(), callbacks, None, max_epochs=EPOCHS, default_root_dir=folder)


def to_its_end(prune: str, folder: Path) -> tuple[Any, float]:
    """Start or resume a run in a process of its own; return its final state and the seconds it trained."""
    run = start(prune, folder)
    start_time = time.monotonic()
    if run.wait() != 0:
        retry = f"{COMMAND} --prune {prune} --child {folder} '' 0"
        raise RuntimeError(f"the run in {folder} failed; to see its error: {retry}")
    return torch.load(folder / "final.pt", weights_only=True), time.monotonic() - start_time


def killed(
    folder: Path, point: str, generator: random.Random, seconds: float = 0, prune: str = "filters"
) -> tuple[str, str]:
    """Start a run and kill it; return where it was killed, and the checkpoint to resume from.

    Args:
        folder: of the checkpoints.
        point: one of ``POINTS``.
        generator: draws the call, or the time, of the kill.
        seconds: duration of an uninterrupted run, the latest time to kill at.
        prune: one of ``PRUNINGS``.
    """
    most = MAX_COUNTS[point]
    count, delay = (generator.randint(1, most), 0.0) if most else (0, generator.uniform(0, seconds))
    run = start(prune, folder, point, count)
    if point == "anywhere":
        time.sleep(delay)
        run.kill()
    where = f"{point}, call {count}" if count else f"after {delay:.2f} s"
    if run.wait() != -signal.SIGKILL:
        where += " (run had ended)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = last_checkpoint(folder)
    return where, str(checkpoint.relative_to(folder)) if checkpoint else "the beginning"


def report(kills: int, seed: int, prune: str = "filters") -> tuple[str, bool]:
    """Kill and resume ``kills`` runs; return the table (Markdown), and whether all final states are equal."""
    generator, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as parent:
        expected, seconds = to_its_end(prune, Path(parent) / "whole")
        for number in range(kills):
            point = POINTS[number % len(POINTS)]
            folder = Path(parent) / str(number)
            where, source = killed(folder, point, generator, seconds, prune)
            state, _ = to_its_end(prune, folder)
            rows.append((number + 1, where, source, "yes" if same(state, expected) else "NO"))
            print(*rows[-1], sep=" | ", flush=True)
    lines = ["| kill | where | resumed from | same bits at the end |", "|--:|:--|:--|:--|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines), all(row[-1] == "yes" for row in rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--prune", choices=list(PRUNINGS), default="filters", help="the way of pruning")
    parser.add_argument(
        "--kills", type=int, help=f"number of kills, without writing the page; default: {KILLS}"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with another seed than 0 the page is not written"
    )
    parser.add_argument("--docs", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "POINT", "COUNT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare; write the page if neither ``--kills`` nor ``--seed`` is given."""
    args = parse(arguments)
    if args.child:
        child(args.prune, Path(args.child[0]), args.child[1], int(args.child[2]))
        return
    table, success = report(args.kills or KILLS[args.prune], args.seed, args.prune)
    if args.kills is None and args.seed == 0:
        option = "" if args.prune == "filters" else f" --prune {args.prune}"
        text = f"`{COMMAND}{option}` (torch {torch.__version__}, CPU)\n\n{table}"
        ReportFiles("kill", args.docs).write_section(args.prune, text)
    raise SystemExit(0 if success else "the final state of a resumed run differs")


if __name__ == "__main__":
    main()
