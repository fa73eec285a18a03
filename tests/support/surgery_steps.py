"""Input and training step that the tests of surgery share."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model.train()(X).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
