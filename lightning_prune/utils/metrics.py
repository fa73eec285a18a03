"""Direction and labels of logged metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

__all__ = ["CONFUSION_CLASSES", "SCORE_LABELS", "higher_is_better", "score_name"]

#: number of classes up to which a run keeps who is taken for whom: size and effort grow with its square
CONFUSION_CLASSES = 256

#: main score of a task, without its stage -> how reports call it
SCORE_LABELS = {"miou": "mIoU", "accuracy": "accuracy"}


def score_name(names: Iterable[str]) -> str:
    """Return the main score among the names of metrics, with or without stages; ``"miou"`` if there is none.

    Example:
        >>> score_name(["val/loss", "val/accuracy"]), score_name(["loss"])
        ('accuracy', 'miou')
    """
    logged = {name.rpartition("/")[2] for name in names}
    return next((name for name in SCORE_LABELS if name in logged), "miou")


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
