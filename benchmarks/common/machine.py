"""Description of the machine and of the packages that a result was measured with."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "machine", "machines", "versions"]

PACKAGES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "torch-pruning")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    installed = {package.metadata["Name"].lower().replace("_", "-") for package in distributions()}
    return {package: version(package) for package in packages if package in installed}


def machine() -> str:
    """Return the model of the processor; the host's name is left out."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{models[0] if models else platform.machine()}, one thread"


def machines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the machines that rows were computed on, and how many on each if there are several.

    Args:
        rows: with the name of a machine under ``"machine"``; those without were computed on this one.

    Example:
        >>> machines([{"machine": "A"}, {"machine": "A"}])
        'A'
        >>> machines([{"machine": "A"}, {"machine": "B"}, {"machine": "A"}])
        'A (2 rows), B (1 rows)'
    """
    counts = Counter(str(row.get("machine") or machine()) for row in rows)
    if len(counts) < 2:
        return next(iter(counts), machine())
    return ", ".join(f"{name} ({count} rows)" for name, count in counts.most_common())
