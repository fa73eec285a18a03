"""One check: what it gets, how it is run, and what is recorded of it."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.common.time_limit import time_limit
from lightning_prune.utils.passing import free_memory

__all__ = ["Check", "Place", "Row", "Skipped", "is_sticky", "run_check"]

Row = dict[str, Any]
T = TypeVar("T")


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a check runs.

    Attributes:
        device: of networks and data.
        small: tiny networks, so that all checks take a minute on a processor.
        folder: for files that the check writes.
    """

    device: torch.device
    small: bool
    folder: Path

    @property
    def accelerator(self) -> str:
        """Name of the device for Lightning's trainer."""
        return "gpu" if self.device.type == "cuda" else "cpu"

    def pick(self, full: T, small: T) -> T:
        """Return one of two settings."""
        return small if self.small else full

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: unique.
        group: ``"correctness"``, ``"latency"``, ``"memory"`` or ``"compiled"``.
        run: returns what was measured. An entry ``"wrong"`` lists what is wrong; the check is right without one.
        gpu_only: why it needs a GPU; empty if it does not.
    """

    name: str
    group: str
    run: Callable[[Place], dict[str, Any]]
    gpu_only: str = ""


def run_check(check: Check, place: Place, seconds: int = 200) -> Row:
    """Run a check, and return its row: name, group, outcome, reason, figures and seconds.

    Args:
        check: to run.
        place: where.
        seconds: after which it fails.
    """
    start = time.perf_counter()
    row: Row = {"name": check.name, "group": check.group, "outcome": "ok", "reason": "", "figures": {}}
    try:
        if check.gpu_only and place.device.type != "cuda":
            raise Skipped(check.gpu_only)
        place.folder.mkdir(parents=True, exist_ok=True)
        with _clean_state(), time_limit(seconds):
            figures = check.run(place)
        wrong = figures.pop("wrong", [])
        row |= {"figures": figures, "reason": "; ".join(wrong), "outcome": "failed" if wrong else "ok"}
    except Skipped as reason:
        row |= {"outcome": "skipped", "reason": str(reason)}
    except Exception as error:
        text = traceback.format_exc()
        row |= {
            "outcome": "failed",
            "reason": f"{type(error).__name__}: {error}"[:2000],
            "traceback": text[-8000:],
        }
        row["sticky"] = is_sticky(error)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def is_sticky(error: BaseException) -> bool:
    """Return whether a process cannot use its GPU any more after an error, as after an illegal access."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


@contextlib.contextmanager
def _clean_state() -> Iterator[None]:
    """Restore what a check may change for the whole process, and free its memory."""
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        if "torch._dynamo" in sys.modules:  # importing it takes seconds
            torch.compiler.reset()
        with contextlib.suppress(torch.AcceleratorError):  # the check's own error is reported, not this one
            free_memory()
