"""NEW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only


def adam(net: nn.Module) -> Optimizer:
    """Adam at 1e-3 over what requires gradients."""
    return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)


@dataclass(frozen=True)
class Training:
    """How candidates are trained, and judged. Everything must survive cloudpickle; lambdas do.

    Attributes:
        batches: of the training data; candidates take them in turn, always the same ones in the same round.
        loss: ``(network, batch) -> loss``, a scalar with gradient; None: this batch is skipped.
        evaluate: ``network -> metric`` on data that no candidate was trained on; the network is in eval mode.
        optimizer: makes the optimizer of a network; the same parameters in the same order each time.
        higher_is_better: of the metric.
        accumulate: batches for each step, whose mean loss counts.
        before_step: ``(network, optimizer)``: what is done to the gradients before each step; clips them, say.
    """

    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor | None]
    evaluate: Callable[[nn.Module], float]
    optimizer: Callable[[nn.Module], Optimizer] = adam
    higher_is_better: bool = True
    accumulate: int = 1
    before_step: Callable[[nn.Module, Optimizer], None] | None = None


def step_(model: nn.Module, optimizer: Optimizer, training: Training, batches: Sequence[Any]) -> None:
    """One step on the mean loss of ``batches``; none if there is no loss."""
    optimizer.zero_grad()
    seen = 0
    for batch in batches:
        loss = training.loss(model, batch)
        if loss is not None:
            (loss / len(batches)).backward()
            seen += 1
    if seen:
        if training.before_step is not None:
            training.before_step(model, optimizer)
        optimizer.step()


def on_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch, on a device."""
    return tree_map_only(Tensor, lambda x: x.to(device), batch)
