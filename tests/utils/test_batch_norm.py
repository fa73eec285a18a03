"""Statistics of batch norms, estimated anew: all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.utils.batch_norm import recalibrate_


def test_forward_that_raises_leaves_statistics_and_momentum_as_they_were():
    net = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.Linear(2, 1))
    net(torch.randn(8, 2) + 3)
    before = copy.deepcopy(net.state_dict())
    examples = [((torch.randn(4, 2),), {}), ((torch.randn(4, 5),), {})]  # the second one has another width
    with pytest.raises((RuntimeError, ValueError)):
        recalibrate_(net, examples)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net[0].momentum == 0.3
    assert net.training
    assert recalibrate_(net, examples[:1]) == 1
    torch.testing.assert_close(net[0].running_mean, examples[0][0][0].mean(0))
    assert net[0].momentum == 0.3
