"""Channel dropout keeps the channels free: dropout of whole maps, with and without ``inplace``, in any rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.testing import with_dead_filters

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DROPOUTS = {
    "1d": (1, lambda: nn.Dropout1d(0.2)),
    "2d": (2, lambda: nn.Dropout2d(0.2)),
    "3d": (3, lambda: nn.Dropout3d(0.2)),
    "in place": (2, lambda: nn.Dropout2d(0.2, inplace=True)),
    "alpha": (2, lambda: nn.FeatureAlphaDropout(0.2)),
    "alpha in place": (2, lambda: nn.FeatureAlphaDropout(0.2, inplace=True)),
}


@pytest.mark.parametrize("case", DROPOUTS)
def test_channels_that_pass_channel_dropout_can_be_removed(case):
    rank, dropout = DROPOUTS[case]
    conv = CONVOLUTIONS[rank]
    net = nn.Sequential(conv(3, 8, 3), dropout(), nn.ReLU(), conv(8, 6, 3), dropout(), conv(6, 2, 1)).eval()
    x = torch.randn(2, 3, *[8] * rank)
    graph = trace(net, x)
    assert len(graph.prunable) == 14
    units = [*graph.layers["0.weight"][:3], *graph.layers["3.weight"][4:]]
    dense = with_dead_filters(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    torch.testing.assert_close(net(x), dense(x))
    assert net.train()(x).requires_grad
