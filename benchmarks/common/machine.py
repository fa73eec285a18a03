"""Description of the machine and of the packages that a result was measured with."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path

__all__ = ["PACKAGES", "machine", "versions"]

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
