"""Run one tool on one network in a process of its own, within limits of time and memory."""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.common.memory import cpu_seconds, private_megabytes, resident

__all__ = ["SPEED", "STRANGERS", "TOOLS", "Limit", "context", "run"]

TOOLS = ("ours", "torch-pruning")
STRANGERS = "strangers"  # ours on the networks of the second zoo
SPEED = "speed"  # both tools in turn
PRELOAD = [
    "benchmarks.zoo.ours",
    "benchmarks.zoo.peer",
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
]
POLL_SECONDS = 0.05


class Limit:
    """Limits of one process: seconds of processor time and megabytes of resident memory.

    Processor time, since wall-clock time would depend on the other load of the machine. A process that sleeps is
    stopped after ten times as many seconds of wall-clock time.
    """

    def __init__(self, seconds: float, megabytes: float) -> None:
        self.seconds, self.megabytes = seconds, megabytes


def context(preload: Sequence[str] = PRELOAD) -> Any:
    """Return a context whose processes fork from a server that has imported everything and has run no model."""
    forkserver = mp.get_context("forkserver")
    forkserver.set_forkserver_preload(list(preload))
    return forkserver


def run(forkserver: Any, tool: str, network: str, limit: Limit) -> dict[str, Any]:
    """Return the result of ``tool`` on ``network`` as a row.

    A process that crashes or exceeds a limit gives a row with the status ``died``, ``timeout`` or ``memory``.
    """
    receiver, sender = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=_work, args=(tool, network, sender, limit, os.getpid()), daemon=True)
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        result = _wait(process, receiver, start, limit)
    finally:
        process.kill()
        process.join()
    return {"network": network, "tool": tool, "total": round(time.monotonic() - start, 2), **result}


def _wait(process: Any, pipe: Connection, start: float, limit: Limit) -> dict[str, Any]:
    while True:
        try:
            if pipe.poll(POLL_SECONDS):
                return dict(pipe.recv())
        except EOFError:
            process.join()
            return {"status": "died", "reason": f"the process ended with {process.exitcode}"}
        if cpu_seconds(process.pid) > limit.seconds or time.monotonic() - start > 10 * limit.seconds:
            return {"status": "timeout", "reason": f"more than {limit.seconds:g} s of processor time"}
        if resident(process.pid) > limit.megabytes:
            return {"status": "memory", "reason": f"more than {limit.megabytes:g} MB resident"}


def _work(tool: str, name: str, pipe: Connection, limit: Limit, parent: int) -> None:
    # Late imports: only the server and its children need these modules, which take seconds to load.
    import torch

    torch.set_num_threads(1)
    _silence()
    _enforce(limit, parent)
    measure, networks = _measured_by(tool)
    try:
        result = measure(networks[name])
    except Exception as error:  # the network cannot even be built or run
        result = {"status": "unusable", "reason": f"{type(error).__name__}: {error}"[:300]}
    pipe.send(result)


def _measured_by(tool: str) -> tuple[Callable[[Any], dict[str, Any]], Mapping[str, Any]]:
    """Return the function that measures a network with a tool, and the networks that it is for, by name."""
    if tool == SPEED:
        from benchmarks.speed import engine

        return engine.measure, engine.networks()
    if tool == STRANGERS:
        from benchmarks.zoo.strangers import catalogue as more
        from benchmarks.zoo.strangers import cut

        return cut.measure, {network.name: network for network in more.catalogue()}
    from benchmarks.zoo import networks, ours, peer

    by_name = {network.name: network for network in networks.catalogue()}
    return ours.measure if tool == TOOLS[0] else peer.measure, by_name


def _enforce(limit: Limit, parent: int) -> None:
    """Set the limits in the kernel too, for the case that the parent ends; the process ends soon after it."""
    seconds = int(limit.seconds + cpu_seconds(os.getpid())) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    size = int((limit.megabytes + private_megabytes()) * 1e6)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while resident(parent):
        time.sleep(1)
    os._exit(1)


def _silence() -> None:
    warnings.simplefilter("ignore")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
