"""``make demo``: train one U-Net on brain slices twice, dense and pruned, for equally many epochs, and compare them.

Both are runs of ``lightning-prune experiment=demo``, at the same time with half of the CPU cores each, the dense one
with ``prune=none``. Arguments of the command line are passed on to both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from hydra.utils import instantiate
from torch import nn

from lightning_prune.cli.config import load_config
from lightning_prune.cli.pages import write_safely
from lightning_prune.reporting.comparison import comparison, threads_or_device
from lightning_prune.reporting.figure import draw_report
from lightning_prune.reporting.model_size import latency
from lightning_prune.reporting.pages.run_files import read_run
from lightning_prune.reporting.pages.run_page import write_run_page
from lightning_prune.reporting.run_folder import NET, PAGE, REPORT, Summary, load_net
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.tables import Table, show

__all__ = ["main"]

KINDS = {"dense": ["prune=none"], "pruned": []}  # kind of run -> its overrides
LATENCY_RUNS = 60


def command(kind: str, folder: Path, threads: int, overrides: Sequence[str] = ()) -> list[str]:
    """Return the command of one of the two runs."""
    interpreter = [sys.executable, "-u", "-m", "lightning_prune"]
    settings = ["experiment=demo", *KINDS[kind], f"hydra.run.dir={folder / kind}", f"threads={threads}"]
    return [*interpreter, *settings, "latency_runs=0", "table=false", *overrides]


def start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    """Start a command with ``threads`` CPU threads; its output and errors come through one pipe."""
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def print_output(process: subprocess.Popen[str], kind: str) -> None:
    """Print each line of a process when it comes, after the kind of run, until the process ends."""
    with process:
        for line in process.stdout or ():
            print(f"{kind:>6} │ {line.rstrip()}", flush=True)


def train(folder: Path, overrides: Sequence[str]) -> dict[str, Summary]:
    """Train both networks at the same time, each with half of the cores.

    Raises:
        SystemExit: a run failed; the other one is stopped.
    """
    threads = max(1, cores() // 2)
    processes = {kind: start(command(kind, folder, threads, overrides), threads) for kind in KINDS}
    # One thread per pipe: a process whose pipe is full would wait for its reader.
    readers = [Thread(target=print_output, args=(process, kind)) for kind, process in processes.items()]
    for reader in readers:
        reader.start()
    failed = first_failure(processes)
    for reader in readers:
        reader.join()
    if failed:
        raise SystemExit(f"the {failed} run failed; see {folder / failed}")
    return {kind: Summary.load(folder / kind) for kind in KINDS}


def first_failure(processes: Mapping[str, subprocess.Popen[str]]) -> str | None:
    """Wait until a process has failed, whose name is returned, or all have ended; stop those that still run."""
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
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trained_net(folder: Path) -> nn.Module:
    """Return the network of a run, in eval mode."""
    net: nn.Module = instantiate(load_config(folder).net, _convert_="all")
    return load_net(net, folder / NET).eval()


def with_latency(summaries: dict[str, Summary], folder: Path, threads: int) -> dict[str, Summary]:
    """Return the summaries with latencies, which are measured after training, when the machine is quiet."""
    torch.set_num_threads(threads)
    shape = load_config(folder / "dense").module.example_input_shape
    nets = {kind: trained_net(folder / kind) for kind in KINDS}
    times = latency(nets, torch.rand(tuple(shape)), LATENCY_RUNS)
    return {
        kind: summary.with_latency(times["dense"], times[kind], threads)
        for kind, summary in summaries.items()
    }


def result_table(dense: Summary, pruned: Summary) -> Table:
    """Return the table that compares both networks."""
    assert dense.final is not None
    assert pruned.final is not None
    where = threads_or_device(pruned.threads, "cpu")
    return comparison(dense.final, pruned.final, dense.test, pruned.test, where)


def _write_page(folder: Path) -> None:
    pruned, dense = (read_run(folder / kind) for kind in ("pruned", "dense"))
    write_run_page(pruned, folder / PAGE, dense)


def main(overrides: Sequence[str] = ()) -> None:
    """Train both networks, measure their latency, print the table and draw the picture."""
    begin = time.perf_counter()
    folder = Path("outputs") / "demo" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    print(
        "A U-Net on brain slices, trained from scratch twice: dense, and pruned while it trains.", flush=True
    )
    summaries = with_latency(train(folder, overrides), folder, cores())
    for kind, summary in summaries.items():
        summary.save(folder / kind)
    draw_report(summaries["pruned"], folder / REPORT, baseline=summaries["dense"])
    write_safely(partial(_write_page, folder), f"lightning-prune report {folder}/pruned {folder}/dense")
    print(
        f"\nBoth trained for {counted(summaries['dense'].epochs, 'epoch')} and tested on the same slices:\n"
    )
    show(result_table(**summaries))
    print(f"\npage:    {folder / PAGE} (picture: {REPORT})")
    print(f"runs:    {folder}/dense, {folder}/pruned ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main(sys.argv[1:])
