"""End pruning runs by errors in the middle: what is left, and does a resumed run end as one without the error?

    python -m benchmarks.robustness.interruptions              # writes docs/results/interruptions.md
    python -m benchmarks.robustness.interruptions --report     # runs nothing, writes the page from its JSON

The result of each case is saved when it is there, and the same command continues with those that are missing.

Runs, processes and the comparison of final states are those of :mod:`benchmarks.robustness.kill`.
"""

from __future__ import annotations

import errno
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import get_worker_info

from benchmarks.robustness.cases import run_cases
from benchmarks.robustness.kill import STILL_RUNNING, processes
from benchmarks.robustness.kill_child import at_call, half_of, save
from benchmarks.robustness.kill_run import EPOCHS, PRUNINGS, Classifier, Stripes, fit, same, shuffled
from lightning_prune.trainer.checkpoint_io import last_checkpoint

COMMAND = "python -m benchmarks.robustness.interruptions"


def _raise(error: Exception, *_: Any, **__: Any) -> None:
    raise error


def _fill_disk(original: Any, checkpoint: Any, file: Any, *_: Any) -> None:
    """Write half of a checkpoint, then fail as a full disk does."""
    file.write(half_of(checkpoint)[0])
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


#: what goes wrong -> a function that arms it in the process of the run, given the run's folder
CASES: dict[str, Callable[[Path], None]] = {
    "`on_after_prune` of the module raises after the second cut": lambda folder: at_call(
        Classifier, "on_after_prune", 2, partial(_raise, ValueError("in on_after_prune"))
    ),
    "`on_after_cut` of a callback raises after the second cut": lambda folder: at_call(
        ModelCheckpoint, "on_after_cut", 4, partial(_raise, ValueError("in on_after_cut"))
    ),
    "out of memory in a training step": lambda folder: at_call(
        Classifier, "training_step", 17, partial(_raise, torch.OutOfMemoryError("CUDA out of memory"))
    ),
    "the disk is full while a checkpoint is written": lambda folder: at_call(torch, "save", 9, _fill_disk),
    "the folder of checkpoints becomes read-only": lambda folder: at_call(
        torch, "save", 9, partial(_raise, OSError(errno.EROFS, os.strerror(errno.EROFS)))
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
    # Only a forked worker has what `_end_worker` replaces, and processes of a fork server do not fork by default.
    loaders = shuffled(num_workers=workers, multiprocessing_context="fork" if workers else None)
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


def section(content: dict[str, Any]) -> str:
    """Return the table (Markdown)."""
    lines = [
        f"`{COMMAND}` (torch {content['versions']['torch']}, CPU)",
        "",
        "| what goes wrong | error that ends the run | files left | resumed from | reaches the budget | same bits |",
        "|:--|:--|:--|:--|:--|:--|",
    ]
    for row in content["runs"]:
        same_bits, budget = ("yes" if row[key] else "NO" for key in ("same", "budget"))
        files = "<br>".join(row["files"])
        lines.append(
            f"| {row['case']} | {row['error']} | {files} | {row['source']} | {budget} | {same_bits} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases that have no result yet, and write the page after each."""
    rows = run_cases("interruptions", __doc__, CASES, result, section, arguments)
    if not all(row["budget"] for row in rows):
        raise SystemExit("a resumed run misses its budget")


if __name__ == "__main__":
    main()
