"""The loss in the outputs of ``training_step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """Return the outputs of ``training_step`` with another loss.

    Example:
        >>> with_loss({"loss": torch.tensor(1.0), "logits": 3}, torch.tensor(2.0))
        {'loss': tensor(2.), 'logits': 3}
    """
    return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss


def step_loss(outputs: Any) -> Tensor | None:
    """Return the loss in the outputs of ``training_step``; None if it skips the batch.

    Raises:
        TypeError: the outputs hold no tensor as loss.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if loss is not None and not isinstance(loss, torch.Tensor):
        raise TypeError(f"training_step must return a loss, not {type(loss).__name__}")
    return loss
