"""``make demo``: one U-Net on brain slices, dense and pruned, the same epochs, one table (level 5).

Two runs of ``lightning-prune experiment=demo``, side by side with half of the CPU cores each, the dense one
with ``prune=none``. What is given on the command line goes to both of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from threading import Thread

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from lightning_prune.reporting.comparison import comparison, threads_or_device
from lightning_prune.reporting.figure import draw_report
from lightning_prune.reporting.model_size import latency
from lightning_prune.reporting.run_folder import CONFIG, NET, REPORT, Summary
from lightning_prune.serialization.saving import load_pruned
from lightning_prune.utils.tables import Table, show

__all__ = ["main"]

KINDS = {"dense": ["prune=none"], "pruned": []}
RUNS = 60  # of the latency measurement


def command(kind: str, folder: Path, threads: int, overrides: Sequence[str] = ()) -> list[str]:
    """The command of one of the two runs."""
    fixed = ["experiment=demo", *KINDS[kind], f"hydra.run.dir={folder / kind}", f"threads={threads}"]
    return [
        sys.executable,
        "-u",
        "-m",
        "lightning_prune",
        *fixed,
        "latency_runs=0",
        "table=false",
        *overrides,
    ]


def start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    """Start it with so many CPU threads; its output and its errors come through one pipe."""
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pass_on(process: subprocess.Popen[str], kind: str) -> None:
    """Print the lines of a process as they come, with a name before each, until it ends."""
    with process:
        for line in process.stdout or ():
            print(f"{kind:>6} │ {line.rstrip()}", flush=True)


def train(folder: Path, overrides: Sequence[str]) -> dict[str, Summary]:
    """Both runs at the same time, each with half of the cores.

    Raises:
        SystemExit: one of them failed; the other is stopped.
    """
    threads = max(1, cores() // 2)
    processes = {kind: start(command(kind, folder, threads, overrides), threads) for kind in KINDS}
    readers = [Thread(target=pass_on, args=(process, kind)) for kind, process in processes.items()]
    for reader in readers:
        reader.start()
    failed = first_failure(processes)
    for reader in readers:
        reader.join()
    if failed:
        raise SystemExit(f"the {failed} run failed; see {folder / failed}")
    return {kind: Summary.load(folder / kind) for kind in KINDS}


def first_failure(processes: Mapping[str, subprocess.Popen[str]]) -> str | None:
    """Wait until all have ended, or one has failed, whose name is returned; none is left running."""
    try:
        while True:
            codes = {kind: process.poll() for kind, process in processes.items()}
            failed = [kind for kind, code in codes.items() if code]
            if failed or None not in codes.values():
                return failed[0] if failed else None
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.terminate()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trained_net(folder: Path) -> nn.Module:
    """The network of a run, from its files."""
    net: nn.Module = instantiate(OmegaConf.load(folder / CONFIG).net, _convert_="all")
    return load_pruned(net, folder / NET).eval()


def with_latency(summaries: dict[str, Summary], folder: Path, threads: int) -> dict[str, Summary]:
    """The summaries with latencies, measured in turns now that the machine is quiet."""
    torch.set_num_threads(threads)
    shape = OmegaConf.load(folder / "dense" / CONFIG).module.example_input_shape
    nets = {kind: trained_net(folder / kind) for kind in KINDS}
    times = latency(nets, torch.rand(tuple(shape)), RUNS)
    return {
        kind: summary.with_latency(times["dense"], times[kind], threads)
        for kind, summary in summaries.items()
    }


def result(dense: Summary, pruned: Summary) -> Table:
    """The table that the demo ends with."""
    assert dense.final is not None
    assert pruned.final is not None
    where = threads_or_device(pruned.threads, "cpu")
    return comparison(dense.final, pruned.final, dense.test, pruned.test, where)


def main(overrides: Sequence[str] = ()) -> None:
    """Train both, measure, print the table and draw the picture."""
    begin = time.perf_counter()
    folder = Path("outputs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    print(
        "A U-Net on brain slices, trained from scratch twice: dense, and pruned while it trains.", flush=True
    )
    summaries = with_latency(train(folder, overrides), folder, cores())
    for kind, summary in summaries.items():
        summary.save(folder / kind)
    draw_report(summaries["pruned"], folder / REPORT, baseline=summaries["dense"])
    print(f"\nThe same {summaries['dense'].epochs} epochs for both, the same test slices:\n")
    show(result(**summaries))
    print(f"\npicture: {folder / REPORT}")
    print(f"runs:    {folder}/dense, {folder}/pruned ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
