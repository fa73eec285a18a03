"""NEW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def replaced(outputs: Any, loss: Tensor) -> Any:
    """What ``training_step`` returned, with another loss."""
    return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss


def task_of(outputs: Any) -> Tensor | None:
    """The loss that ``training_step`` returned; None: this batch is skipped.

    Raises:
        TypeError: there is none.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is not None and not isinstance(loss, torch.Tensor):
        raise TypeError(f"training_step must return a loss, not {type(loss).__name__}")
    return loss
