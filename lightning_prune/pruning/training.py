"""Train and judge a network outside of a trainer: for candidates, and for statistics from a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Training", "adam", "step_"]


def adam(net: nn.Module) -> Optimizer:
    """Return Adam with learning rate 1e-3 over all parameters that require gradients."""
    return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)


@dataclass(frozen=True)
class Training:
    """Instructions by which candidates are trained and judged. All must survive cloudpickle, as lambdas do.

    Attributes:
        batches: training batches; candidates take them in turn, all candidates of a round the same ones.
        loss: ``(network, batch) -> loss``, a scalar with gradient; None: this batch is skipped.
        evaluate: ``network -> metric`` on data that no candidate is trained on; the network is in eval mode.
        optimizer: returns an optimizer of a network, with its parameters in the same order each time.
        higher_is_better: whether a higher metric is better.
        accumulate: number of batches per step; their losses are averaged.
        before_step: ``(network, optimizer)``, called before each step, for example to clip gradients.

    Example:
        >>> images = torch.ones(4, 2)
        >>> training = Training([images], lambda net, x: net(x).square().mean(), lambda net: float(net(images).sum()))
        >>> training.loss(nn.Linear(2, 1), images).shape
        torch.Size([])
    """

    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor | None]
    evaluate: Callable[[nn.Module], float]
    optimizer: Callable[[nn.Module], Optimizer] = adam
    higher_is_better: bool = True
    accumulate: int = 1
    before_step: Callable[[nn.Module, Optimizer], None] | None = None


def step_(model: nn.Module, optimizer: Optimizer, training: Training, batches: Sequence[Any]) -> None:
    """Make one optimizer step on the mean loss of ``batches``; none if every batch is skipped."""
    optimizer.zero_grad()
    batches_used = 0
    for batch in batches:
        loss = training.loss(model, batch)
        if loss is not None:
            (loss / len(batches)).backward()
            batches_used += 1
    if batches_used:
        if training.before_step is not None:
            training.before_step(model, optimizer)
        optimizer.step()
