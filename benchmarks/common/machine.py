"""NEW."""

from __future__ import annotations

import platform
import re
from importlib.metadata import distributions, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "torch-pruning")


def versions() -> dict[str, str]:
    """What was measured with, as far as it is installed."""
    installed = {package.metadata["Name"].lower().replace("_", "-") for package in distributions()}
    return {package: version(package) for package in PACKAGES if package in installed}


def machine() -> str:
    """The kind of machine, without its name."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{models[0] if models else platform.machine()}, one thread"
