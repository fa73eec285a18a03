"""Surgery reads what is stored and nothing else; values that compare to nothing, and tensors without elements."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune import TraceError, prune_, trace
from tests.support.nets import Net


def test_nan_in_a_parameter_or_buffer_does_not_prevent_cuts():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    net[1].running_var[0] = net[0].bias.data[2] = float("nan")
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    prune_(net, graph, graph.layers["0.weight"][[1, 5]])
    assert net[1].running_var.isnan().tolist() == [True, *[False] * 5]
    assert net[0].bias.isnan().tolist() == [False, True, *[False] * 4]


def test_nan_in_a_constant_of_the_code_does_not_prevent_cuts():
    def run(net, x):
        y = net.a(x)
        return net.b(torch.where(y > 1e9, torch.tensor(float("nan")), y))

    net = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)).eval()
    graph = trace(net, torch.zeros(1, 3, 4, 4))
    prune_(net, graph, graph.layers["a.weight"][:3])
    assert net.b.in_channels == 5


@pytest.mark.parametrize("training", [False, True])
def test_cut_runs_no_power_iteration_of_spectral_norm(training):
    net = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(1, 12, 3)), nn.ReLU(), nn.Conv2d(12, 4, 1))
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    graph = trace(net, torch.zeros(1, 1, 8, 8))
    prune_(net, graph, graph.layers["0.parametrizations.weight.original"][:3])
    after = net.state_dict()
    assert net[0].out_channels == 9
    torch.testing.assert_close(
        after["0.parametrizations.weight.0._u"], before["0.parametrizations.weight.0._u"][3:]
    )
    torch.testing.assert_close(
        after["0.parametrizations.weight.0._v"], before["0.parametrizations.weight.0._v"]
    )


def test_reshape_without_elements_is_followed_by_its_sizes():
    def run(net, x):
        y = net.a(x)
        return net.b(y), y[..., :0].reshape(0, 8).sum() + y[..., :0].reshape(0, y.shape[1]).sum()

    net = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1)).eval()
    graph = trace(net, torch.zeros(1, 3, 4, 4))
    prune_(net, graph, graph.layers["a.weight"][:3])
    assert net.b.in_channels == 5


def test_trace_error_says_what_each_mode_raised():
    def run(net, x):
        raise ValueError("no targets" if net.training else "three channels expected")

    with pytest.raises(TraceError, match=r"eval mode ValueError: three.*train mode ValueError: no"):
        trace(Net(run, a=nn.Conv2d(3, 8, 1)), torch.zeros(1, 1, 4, 4))
