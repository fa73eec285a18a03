"""Prune on several processes, with each launcher, unequal data, other numbers of processes, and a killed rank.

    python -m benchmarks.robustness.distributed             # writes docs/results/distributed.md
    python -m benchmarks.robustness.distributed --report    # runs nothing, writes the page from its JSON

The result of each case is saved when it is there, and the same command continues with those that are missing.
The runs are those of :mod:`benchmarks.robustness.distributed_run`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.robustness.cases import run_cases
from benchmarks.robustness.distributed_run import EPOCHS, Run
from benchmarks.robustness.kill_run import same

__all__ = ["CASES", "launch", "section"]

COMMAND = "python -m benchmarks.robustness.distributed"
STILL_RUNNING = 400  # seconds after which a run counts as stuck
ROOT = Path(__file__).parents[2]
CLOSE = 1e-5  # relative difference of importance that single precision explains
Checks = dict[str, bool]


def launch(folder: Path, run: Run) -> tuple[int, str]:
    """Run to the end of all its processes; return the exit code of the first one, and what all printed.

    Raises:
        RuntimeError: a process does not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.robustness.distributed_run",
        str(folder),
        json.dumps(asdict(run)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=STILL_RUNNING)  # all ranks hold the pipe: waits for all
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError(f"{run} does not end") from None
    return process.returncode, output


def finished(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Run, unless it has ended before; return what each rank has at the end.

    Raises:
        RuntimeError: the run failed.
    """
    mark = folder / f"ended {run}"
    if not mark.exists():
        code, output = launch(folder, run)
        if code != 0:
            raise RuntimeError(f"{run} failed: {output[-3000:]}")
        mark.touch()
    return [torch.load(folder / f"rank {rank}.pt", weights_only=True) for rank in range(run.processes)]


def agreement(ranks: Sequence[dict[str, Any]]) -> Checks:
    """Return what must hold for all ranks of a run."""
    first, *others = ranks
    return {
        "same record": all(same(rank["record"], first["record"]) for rank in others),
        "same cuts": all(same(rank["cuts"], first["cuts"]) for rank in others),
        "same weights after every batch": all(rank["weights"] == first["weights"] for rank in others),
        "within the budget": all(rank["within_budget"] for rank in ranks),
        "two cuts or more": len(first["cuts"]) > 1,
    }


def row(end: dict[str, Any], checks: Checks, **more: Any) -> dict[str, Any]:
    """Return a row of the table."""
    return {"cuts": [cut[0] for cut in end["cuts"]], "macs": end["macs"], "checks": checks, **more}


def launched(strategy: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train to the end; after spawn and fork, compare the main process with rank 0."""
    ranks = finished(folder, Run(strategy, processes))
    checks = agreement(ranks)
    if strategy != "ddp":
        main = torch.load(folder / "main.pt", weights_only=True)
        checks["main process holds weights and record of rank 0"] = all(
            same(main[key], ranks[0][key]) for key in ("state", "record", "cuts", "within_budget")
        )
    return row(ranks[0], checks)


def narrower(record: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether all that a record keeps was kept before."""
    return all(
        set(kept) <= set(before["kept"].get(name, {}).get(dim, kept))
        for name, dims in record["kept"].items()
        for dim, kept in dims.items()
    )


def resumed(first: int, second: int, save_step: int, folder: Path) -> dict[str, Any]:
    """Train on ``first`` processes for half of the epochs, and to the end on ``second`` ones.

    Args:
        first: number of processes.
        second: number of processes after the resume.
        save_step: step of the checkpoint, within an epoch; 0: at the end of the last epoch.
        folder: of the run.
    """
    kinds = {1: "auto"}
    before = finished(folder, Run(kinds.get(first, "ddp"), first, EPOCHS // 2, save_step=save_step))[0]
    if save_step:
        for path in folder.glob("epoch*.ckpt"):
            path.unlink()
        before = record_in(folder / "within.ckpt")
    ranks = finished(folder, Run(kinds.get(second, "ddp"), second))
    cuts, former = ranks[0]["cuts"], before["cuts"]
    checks = agreement(ranks) | {
        "cuts before the resume kept": len(former) > 0 and same(cuts[: len(former)], former),
        "record continues": narrower(ranks[0]["record"], before["record"]),
        "cuts after the resume": len(cuts) > len(former),
    }
    return row(ranks[0], checks, resumed_after=[cut[0] for cut in former])


def record_in(path: Path) -> dict[str, Any]:
    """Return record and cuts that a checkpoint holds."""
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (each for each in checkpoint["callbacks"].values() if "history" in each)
    cuts = [(cut["epoch"], cut["filters"], cut["after"]) for cut in state["history"]]
    return {"record": checkpoint["lightning_prune"]["record"], "cuts": cuts}


def killed(rank: int, folder: Path) -> dict[str, Any]:
    """Kill one of two ranks after the first cut, resume, and compare with a run that was not killed."""
    whole = finished(folder.parent / "whole", Run())
    code, _ = launch(folder / "killed", Run(kill=rank))
    left = sorted(path.name for path in (folder / "killed").glob("rank*"))
    ranks = finished(folder / "killed", Run())
    equal = all(
        same(again[key], once[key])
        for again, once in zip(ranks, whole, strict=True)
        for key in ("state", "record", "cuts")
    )
    checks = {
        "both ranks ended with an error": code != 0 and not left,
        "same bits as without the kill": equal,
    }
    return row(ranks[0], agreement(ranks) | checks)


def unequal(kind: str, folder: Path) -> dict[str, Any]:
    """Have the second rank train on fewer samples."""
    run = Run(processes=2, unequal=kind)
    if kind == "batches":
        code, output = launch(folder, run)
        message = next((line for line in output.splitlines() if "training batches" in line), "")
        checks = {"refused before training": code != 0 and "ranks have 3, 2 training batches" in message}
        return {"cuts": [], "macs": 1.0, "checks": checks}
    ranks = finished(folder / "two", run)
    if kind == "limited":
        return row(ranks[0], agreement(ranks))
    (alone,) = finished(folder / "one", Run("auto", 1, unequal="whole"))
    values, expected = (np.array(end["importance"]) for end in (ranks[0], alone))
    scored = np.isfinite(expected)
    difference = float(np.abs(values[scored] - expected[scored]).max() / expected[scored].max())
    checks = agreement(ranks) | {
        "same importance on both ranks": ranks[0]["importance"] == ranks[1]["importance"],
        "importance of the data of both ranks": bool((np.isfinite(values) == scored).all())
        and difference < CLOSE,
    }
    return row(ranks[0], checks, difference=difference)


#: name -> function of a folder that returns a row
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{
        f"`{strategy}`, {processes} processes": partial(launched, strategy, processes)
        for strategy in ("ddp", "ddp_spawn", "ddp_fork")
        for processes in (2, 4)
    },
    "resumed on 1 instead of 2 processes": partial(resumed, 2, 1, 0),
    "resumed on 2 instead of 1": partial(resumed, 1, 2, 0),
    "resumed on 2 instead of 4": partial(resumed, 4, 2, 0),
    "resumed on 1 instead of 2, within an epoch": partial(resumed, 2, 1, 7),
    "resumed on 2 instead of 1, after more batches than an epoch now has": partial(resumed, 1, 2, 14),
    "rank 0 of 2 killed": partial(killed, 0),
    "rank 1 of 2 killed": partial(killed, 1),
    "fewer samples on rank 1, as many batches": partial(unequal, "samples"),
    "fewer batches on rank 1": partial(unequal, "batches"),
    "fewer batches on rank 1, `limit_train_batches=2`": partial(unequal, "limited"),
}


def section(content: dict[str, Any]) -> str:
    """Return the table (Markdown)."""
    lines = [
        f"`{COMMAND}` (torch {content['versions']['torch']}, CPU, gloo, {content['date']})",
        "",
        "| run | epochs of the cuts | MACs left | what was checked | all true |",
        "|:--|:--|--:|:--|:--|",
    ]
    for result in sorted(content["runs"], key=lambda result: list(CASES).index(result["case"])):
        checks = [name if good else f"NOT {name}" for name, good in result["checks"].items()]
        checks += [f"relative difference {result['difference']:.0e}"] if "difference" in result else []
        epochs = ", ".join(map(str, result["cuts"])) or "none"
        good = "yes" if all(result["checks"].values()) else "NO"
        lines.append(f"| {result['case']} | {epochs} | {result['macs']:.3f} | {'; '.join(checks)} | {good} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases that have no result yet, and write the page after each."""

    def run(case: str, parent: Path) -> dict[str, Any]:
        return {"case": case, **CASES[case](parent / str(list(CASES).index(case)))}

    rows = run_cases("distributed", __doc__, CASES, run, section, arguments)
    if not all(all(row["checks"].values()) for row in rows):
        raise SystemExit("a check failed")


if __name__ == "__main__":
    main()
