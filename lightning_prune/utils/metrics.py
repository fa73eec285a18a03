"""Direction of logged metrics."""

from __future__ import annotations

from typing import Literal

__all__ = ["higher_is_better"]


def higher_is_better(name: str, mode: Literal["max", "min"] | None = None) -> bool:
    """Return whether a higher value of the metric ``name`` is better.

    Args:
        name: as logged, such as ``"val/miou"``.
        mode: ``"max"`` or ``"min"`` decide; None: lower is better if the name contains "loss" or "error".

    Example:
        >>> higher_is_better("val/miou"), higher_is_better("val/loss"), higher_is_better("val/loss", "max")
        (True, False, True)
    """
    return not ("loss" in name or "error" in name) if mode is None else mode == "max"
