"""Taylor without gradients says what to do, with and without a trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import one_shot, trace
from lightning_prune.criteria import TaylorGate, TaylorWeight


@pytest.mark.parametrize("criterion", [TaylorWeight(), TaylorGate()])
def test_taylor_without_gradients_says_what_to_do_outside_of_a_trainer(criterion):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3))
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="Without a trainer, pass batches and a loss to one_shot"):
        criterion(trace(net, x), net)
    with pytest.raises(ValueError, match="Without a trainer, pass batches and a loss to one_shot") as raised:
        one_shot(net, x, {"macs": 0.5}, criterion)
    assert "nothing was cut" in raised.value.__notes__[0]
    assert net[0].out_channels == 8
    with pytest.raises(ValueError, match="uses gradients: pass loss="):
        one_shot(net, x, {"macs": 0.5}, criterion, batches=[x])
