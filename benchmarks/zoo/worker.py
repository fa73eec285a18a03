"""Run one tool on one network in a process of its own, within a limit of time and memory."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import threading
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.common.memory import cpu_seconds, private_megabytes, resident

__all__ = ["TOOLS", "Limit", "context", "run"]

TOOLS = ("ours", "torch-pruning")
PRELOAD = [
    "benchmarks.zoo.ours",
    "benchmarks.zoo.peer",
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
]
POLL = 0.05


class Limit:
    """What one process may take: seconds of processor time, megabytes of resident memory; both are watched.

    Processor time, because a wall clock would punish whoever runs while the machine is busy; one that sleeps
    is stopped at ten times as much on the wall clock.
    """

    def __init__(self, seconds: float, megabytes: float) -> None:
        self.seconds, self.megabytes = seconds, megabytes


def context() -> Any:
    """Processes fork from a server that has imported everything and never run a model."""
    forkserver = mp.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    return forkserver


def run(forkserver: Any, tool: str, network: str, limit: Limit) -> dict[str, Any]:
    """What ``tool`` does to ``network``; a process that dies or takes too much is a result, too."""
    ours, theirs = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=_work, args=(tool, network, theirs, limit, os.getpid()), daemon=True)
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        found = _wait(process, ours, started, limit)
    finally:
        process.kill()
        process.join()
    return {"network": network, "tool": tool, "total": round(time.monotonic() - started, 2), **found}


def _wait(process: Any, pipe: Connection, started: float, limit: Limit) -> dict[str, Any]:
    while True:
        try:
            if pipe.poll(POLL):
                return dict(pipe.recv())
        except EOFError:
            process.join()
            return {"status": "died", "reason": f"the process ended with {process.exitcode}"}
        if cpu_seconds(process.pid) > limit.seconds or time.monotonic() - started > 10 * limit.seconds:
            return {"status": "timeout", "reason": f"more than {limit.seconds:g} s of processor time"}
        if resident(process.pid) > limit.megabytes:
            return {"status": "memory", "reason": f"more than {limit.megabytes:g} MB resident"}


def _work(tool: str, name: str, pipe: Connection, limit: Limit, runner: int) -> None:
    import torch  # imported by the server already

    from benchmarks.zoo import ours as zoo_ours
    from benchmarks.zoo import peer as zoo_peer
    from benchmarks.zoo.networks import catalogue

    torch.set_num_threads(1)
    _quiet()
    _bind(limit, runner)
    measure = zoo_ours.measure if tool == TOOLS[0] else zoo_peer.measure
    try:
        found = measure({network.name: network for network in catalogue()}[name])
    except Exception as raised:  # the network cannot even be built or run
        found = {"status": "unusable", "reason": f"{type(raised).__name__}: {raised}"[:300]}
    pipe.send(found)


def _bind(limit: Limit, runner: int) -> None:
    """The kernel enforces the limits should the runner be gone, and the process ends soon after it."""
    seconds = int(limit.seconds + cpu_seconds(os.getpid())) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    most = int((limit.megabytes + private_megabytes()) * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    threading.Thread(target=_end_with, args=(runner,), daemon=True).start()


def _end_with(runner: int) -> None:
    while resident(runner):
        time.sleep(1)
    os._exit(1)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
