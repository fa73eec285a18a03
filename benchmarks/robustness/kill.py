"""Kill -9 a pruning run again and again, resume it in a new process, and compare with a run that was left alone.

    python -m benchmarks.robustness.kill                     # twenty times, into docs/kill.md; five minutes
    python -m benchmarks.robustness.kill --prune slimming    # likewise with SlimmingCallback, into the same page; so averaged
                                                  # (with a moving average of the weights) and rounds (NetAdapt)
    python -m benchmarks.robustness.kill --kills 3 --seed 5  # only shows its table

The run, of :mod:`benchmarks.robustness.kill_run`, has everything that must go on, and three checkpoint callbacks. It dies
inside surgery (some tensors cut, others not), inside the writing of a checkpoint (half of the file
written), inside validation, and at moments that only the clock chooses. Equal means: every bit of weights,
buffers, optimizer and scheduler state, the record, the cuts, and the callback's own state.
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
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.common.pages import replace_between
from benchmarks.robustness.kill_run import BATCHES, EPOCHS, PRUNINGS, Classifier, fit, same, shuffled
from lightning_prune.surgery import prune as surgery
from lightning_prune.trainer.checkpoint_io import last_checkpoint

ROOT = Path(__file__).parents[2]
KILLS = {"filters": 20, "slimming": 8, "averaged": 4, "rounds": 8}
POINTS = ("surgery", "writing", "validation", "anywhere")


# -- the process that dies -------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    """As by ``kill -9``: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(checkpoint: Any, file: Any) -> None:
    """What a process that is killed while it writes leaves behind."""
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    die()


save = torch.save


def arm(point: str, count: int) -> None:
    """Die when ``point`` is reached for the ``count``-th time."""
    owner: Any
    owner, name, end = {
        "surgery": (surgery, "set_data", die),
        "writing": (torch, "save", write_half),
        "validation": (Classifier, "validation_step", die),
    }[point]
    before, left = getattr(owner, name), count

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        return end(*args) if left == 0 else before(*args, **kwargs)

    setattr(owner, name, counted)


def checkpointed(folder: Path, prune: str = "filters") -> dict[str, Any]:
    """Train with checkpoints, from the last one that is whole; what there is at the end."""
    keep = [
        ModelCheckpoint(folder / "steps", every_n_train_steps=2),
        ModelCheckpoint(folder / "validated", save_on_train_epoch_end=False),
        ModelCheckpoint(folder / "epochs", save_on_train_epoch_end=True, every_n_epochs=2),
    ]
    callbacks, found = [*PRUNINGS[prune](), *keep], last_checkpoint(folder)
    return fit(Classifier(), shuffled(), callbacks, found, max_epochs=EPOCHS, default_root_dir=folder)


def child(prune: str, folder: Path, point: str, count: int) -> None:
    """Train, and die at ``point`` or write what there is at the end."""
    if point in POINTS[:3]:
        arm(point, count)
    print("training", flush=True)
    save(checkpointed(folder, prune), folder / "final.pt")


# -- the process that kills ------------------------------------------------------------------------------------


def start(prune: str, folder: Path, point: str = "", count: int = 0) -> subprocess.Popen[str]:
    """A run in a process of its own, as far as its first line: from there on it trains."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.robustness.kill", "--prune", prune]
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
    """The result of the run that nobody kills, in this process; a search keeps its state in ``folder``."""
    callbacks = PRUNINGS[prune]()
    return fit(Classifier(), shuffled(), callbacks, None, max_epochs=EPOCHS, default_root_dir=folder)


def to_its_end(prune: str, folder: Path) -> tuple[Any, float]:
    """The result of a run that nobody kills, in a process of its own, and how many seconds it trained."""
    run = start(prune, folder)
    since = time.monotonic()
    if run.wait() != 0:
        again = f"python -m benchmarks.robustness.kill --prune {prune} --child {folder} '' 0"
        raise RuntimeError(f"the run in {folder} failed; try {again}")
    return torch.load(folder / "final.pt", weights_only=True), time.monotonic() - since


def killed(
    folder: Path, point: str, draw: random.Random, seconds: float = 0, prune: str = "filters"
) -> tuple[str, str]:
    """Start a run and kill it: where it died, and what there is to resume from."""
    most = {"surgery": 20, "writing": 30, "validation": EPOCHS * BATCHES, "anywhere": 0}[point]
    count, delay = (draw.randint(1, most), 0.0) if most else (0, draw.uniform(0, seconds))
    run = start(prune, folder, point, count)
    if point == "anywhere":
        time.sleep(delay)
        run.kill()
    where = f"{point}, call {count}" if count else f"after {delay:.2f} s"
    if run.wait() != -signal.SIGKILL:
        where += " (had ended)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = last_checkpoint(folder)
    return where, str(found.relative_to(folder)) if found else "the beginning"


def report(kills: int, seed: int, prune: str = "filters") -> tuple[str, bool]:
    """The table, and whether all runs came out the same."""
    draw, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as parent:
        whole, seconds = to_its_end(prune, Path(parent) / "whole")
        for number in range(kills):
            point = POINTS[number % len(POINTS)]
            folder = Path(parent) / str(number)
            where, source = killed(folder, point, draw, seconds, prune)
            found, _ = to_its_end(prune, folder)
            rows.append((number + 1, where, source, "yes" if same(found, whole) else "NO"))
            print(*rows[-1], sep=" | ", flush=True)
    lines = ["| kill | where | resumed from | same bits at the end |", "|--:|:--|:--|:--|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines), all(row[-1] == "yes" for row in rows)


def main() -> None:
    """Kill, resume, compare, and write the page if nothing was asked for in particular."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prune", choices=list(PRUNINGS), default="filters")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "POINT", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.prune, Path(given.child[0]), given.child[1], int(given.child[2]))
        return
    table, good = report(given.kills or KILLS[given.prune], given.seed, given.prune)
    if given.kills is None and given.seed == 0:
        option = "" if given.prune == "filters" else f" --prune {given.prune}"
        text = f"`python -m benchmarks.robustness.kill{option}` (torch {torch.__version__}, CPU)\n\n{table}"
        replace_between(ROOT / "docs" / "kill.md", given.prune, text)
    raise SystemExit(0 if good else "a resumed run ended differently")


if __name__ == "__main__":
    main()
