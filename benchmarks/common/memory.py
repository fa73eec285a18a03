"""The peak memory of a piece of work, from the kernel's own high-water mark, and what processes take (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "cpu_seconds", "peak_memory", "private_megabytes", "resident"]

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Megabytes beyond what the process held before; known once the block is left."""

    megabytes: float = float("nan")


def resident(process: int) -> float:
    """Megabytes that a process holds, 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0.0
    return int(fields[1]) * 4096 / 1e6


def cpu_seconds(process: int) -> float:
    """Processor time that a process has used, 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_megabytes() -> float:
    """Megabytes that this process has mapped for itself, whether it uses them or not."""
    return _kilobytes("VmData") * 1024 / 1e6


def _kilobytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak of resident memory within the block, beyond what was resident before it."""
    peak = Peak()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is taken now
    RESET.write_text("5")
    before = _kilobytes("VmRSS")
    try:
        yield peak
    finally:
        peak.megabytes = (_kilobytes("VmHWM") - before) * 1024 / 1e6
