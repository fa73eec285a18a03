"""End pruning runs by errors in the middle: what is left, and does a resumed run end as one without the error?

    python -m benchmarks.robustness.interruptions              # writes docs/results/interruptions.md
    python -m benchmarks.robustness.interruptions --report     # runs nothing, writes the page from its JSON

The result of each case is saved when it is there, and the same command continues with those that are missing.

Runs, processes and the comparison of final states are those of :mod:`benchmarks.robustness.kill`.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import get_worker_info

from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.robustness.kill import STILL_RUNNING, processes, save
from benchmarks.robustness.kill_run import EPOCHS, PRUNINGS, Classifier, Stripes, fit, same, shuffled
from lightning_prune.trainer.checkpoint_io import last_checkpoint

COMMAND = "python -m benchmarks.robustness.interruptions"


def _at_call(owner: Any, name: str, number: int, fail: Callable[..., Any]) -> None:
    """Have the ``number``-th call of a function or method call ``fail`` instead."""
    original, calls_left = getattr(owner, name, lambda *_: None), number

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls_left
        calls_left -= 1
        return fail(*args, **kwargs) if calls_left == 0 else original(*args, **kwargs)

    setattr(owner, name, counted)


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def _fill_disk(checkpoint: Any, file: Any, *_: Any) -> None:
    """Write half of a checkpoint, then fail as a full disk does."""
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _end_worker(folder: Path) -> None:
    """Have a data worker end without a word at the sixtieth sample."""
    served, load = folder / "served", Stripes.__getitem__

    def get(self: Stripes, index: int) -> Any:
        with served.open("a") as file:
            file.write("x")
        if served.stat().st_size >= 60 and get_worker_info() is not None:
            os._exit(1)
        return load(self, index)

    Stripes.__getitem__ = get  # type: ignore[method-assign]


ENOSPC, EROFS = errno.ENOSPC, errno.EROFS
#: what goes wrong -> a function that arms it in the process of the run, given the run's folder
CASES: dict[str, Callable[[Path], None]] = {
    "`on_after_prune` of the module raises after the second cut": lambda folder: _at_call(
        Classifier, "on_after_prune", 2, _raise(ValueError("in on_after_prune"))
    ),
    "`on_after_cut` of a callback raises after the second cut": lambda folder: _at_call(
        ModelCheckpoint, "on_after_cut", 4, _raise(ValueError("in on_after_cut"))
    ),
    "out of memory in a training step": lambda folder: _at_call(
        Classifier, "training_step", 17, _raise(torch.OutOfMemoryError("CUDA out of memory"))
    ),
    "the disk is full while a checkpoint is written": lambda folder: _at_call(torch, "save", 9, _fill_disk),
    "the folder of checkpoints becomes read-only": lambda folder: _at_call(
        torch, "save", 9, _raise(OSError(EROFS, os.strerror(EROFS)))
    ),
    "a data worker dies": _end_worker,
}


def run(folder: Path, workers: int) -> dict[str, Any]:
    """Train with checkpoints in ``folder``, from the last complete one if there is one; return the final state."""
    checkpoints = [
        ModelCheckpoint(folder / "steps", every_n_train_steps=2),
        ModelCheckpoint(folder / "epochs", save_on_train_epoch_end=True),
    ]
    callbacks, resume = [*PRUNINGS["compensation"](), *checkpoints], last_checkpoint(folder)
    loaders = shuffled(num_workers=workers)
    return fit(Classifier(), loaders, callbacks, resume, max_epochs=EPOCHS, default_root_dir=folder)


def child(folder: Path, case: str, workers: int) -> None:
    """Train in a process of its own; write the final state, or the error."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    folder.mkdir(parents=True, exist_ok=True)
    if case:
        CASES[case](folder)
    try:
        save(run(folder, workers), folder / "final.pt")
    except Exception as error:
        lines = traceback.format_exception_only(error)[-1].strip().splitlines()
        (folder / "error.txt").write_text(lines[0][:120])


def in_process(folder: Path, case: str, workers: int) -> None:
    """Run :func:`child` and wait for its end."""
    processes.set_forkserver_preload(["benchmarks.robustness.kill_run"])
    process = processes.Process(target=child, args=(folder, case, workers))
    process.start()
    process.join(STILL_RUNNING)
    if process.exitcode is None:
        process.kill()
        raise RuntimeError(f"{case or 'a run'} in {folder} does not end")


def result(case: str, parent: Path) -> dict[str, Any]:
    """Return a row of the table."""
    workers = 1 if "worker" in case else 0
    whole, folder = parent / f"whole{workers}", parent / str(list(CASES).index(case))
    if not whole.exists():
        in_process(whole, "", workers)
    in_process(folder, case, workers)
    error = (folder / "error.txt").read_text()
    files = sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt")
    checkpoint = last_checkpoint(folder)
    in_process(folder, "", workers)
    state = torch.load(folder / "final.pt", weights_only=True)
    expected = torch.load(whole / "final.pt", weights_only=True)
    return {
        "case": case,
        "error": error,
        "files": [name for name in files if name != "served"],
        "source": checkpoint.name if checkpoint else "the beginning",
        "budget": bool(state["state"]["history"][-1]["share"]["macs"] <= 0.5),
        "same": bool(same(state, expected)),
    }


def section(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table (Markdown)."""
    lines = [
        f"`{COMMAND}` (torch {torch.__version__}, CPU)",
        "",
        "| what goes wrong | error that ends the run | files left | resumed from | reaches the budget | same bits |",
        "|:--|:--|:--|:--|:--|:--|",
    ]
    for row in rows:
        same_bits, budget = ("yes" if row[key] else "NO" for key in ("same", "budget"))
        files = "<br>".join(row["files"])
        lines.append(
            f"| {row['case']} | {row['error']} | {files} | {row['source']} | {budget} | {same_bits} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases that have no result yet, and write the page after each."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, default=RESULTS, help="folder of the page and data/")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page from its JSON")
    args = parser.parse_args(arguments)
    files = ReportFiles("interruptions", args.docs)
    rows = list(files.load()["runs"]) if files.data.is_file() else []
    done = {row["case"] for row in rows}
    with tempfile.TemporaryDirectory() as parent:
        for case in () if args.report else (case for case in CASES if case not in done):
            rows.append(result(case, Path(parent)))
            print(*rows[-1].values(), sep=" | ", flush=True)
            files.save_runs(rows)
            files.write_section("interruptions", section(rows))
    files.write_section("interruptions", section(rows))
    sys.exit(0 if all(row["budget"] for row in rows) else "a resumed run misses its budget")


if __name__ == "__main__":
    main()
