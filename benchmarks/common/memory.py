"""Memory and processor time of processes, read from the kernel (Linux)."""

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
    """Peak memory of a block.

    Attributes:
        megabytes: beyond the memory before the block; NaN until the block has ended.
        before: resident memory before the block, in megabytes.
    """

    megabytes: float = float("nan")
    before: float = float("nan")


def resident(process: int) -> float:
    """Return the resident memory of a process in megabytes, 0 if the process has ended."""
    try:
        fields = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0.0
    return int(fields[1]) * 4096 / 1e6


def cpu_seconds(process: int) -> float:
    """Return the processor time of a process in seconds, 0 if the process has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_megabytes() -> float:
    """Return the private memory that this process has mapped, used or not, in megabytes."""
    return _kilobytes("VmData") * 1024 / 1e6


def _kilobytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak of resident memory within the block, beyond the resident memory before it."""
    peak = Peak()
    gc.collect()
    # Return freed memory to the kernel: the block would use it again, and its peak would look too small.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    RESET.write_text("5")
    before = _kilobytes("VmRSS")
    peak.before = before * 1024 / 1e6
    try:
        yield peak
    finally:
        peak.megabytes = (_kilobytes("VmHWM") - before) * 1024 / 1e6
