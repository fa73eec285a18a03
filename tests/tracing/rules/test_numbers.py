"""A number of channels that becomes a number: it is followed and told, pinned, or the cut is refused by name."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import SurgeryError, prune_, trace
from tests.support.nets import Net

#: what the trace follows: units are cut, and are told to change the others
FOLLOWED = {
    "tensor": lambda y, c: y / torch.sqrt(torch.tensor(c)),
    "list": lambda y, c: y / torch.as_tensor([c, c]).sum(),
    "full": lambda y, c: y / torch.full((1,), c).sqrt(),
    "new_tensor": lambda y, c: y / y.new_tensor(float(c)),
    "FloatTensor": lambda y, c: y / torch.FloatTensor([c / 2]),
    "fill_": lambda y, c: y / torch.zeros(1).fill_(c),
    "power": lambda y, c: y / c**0.5,
    "math.sqrt": lambda y, c: y / math.sqrt(c),
    "product": lambda y, c: y * c,
    "numel": lambda y, c: y / y[0, :, 0, 0].numel(),
    "arange": lambda y, c: y / torch.arange(c).sum(),
    "linspace": lambda y, c: y / torch.linspace(0, c, 5).sum(),
    "eye": lambda y, c: y / torch.eye(c).sum(),
    "ones": lambda y, c: y / torch.ones(c).sum(),
    "ones_like": lambda y, c: y / torch.ones_like(y).sum(1, keepdim=True),
    "masked_fill": lambda y, c: y.masked_fill(y > 1, c),
    "clamp": lambda y, c: y.clamp(max=c / 16),
    "scale of attention": lambda y, c: _attention(y, c**-0.5),
}
#: what becomes a plain integer
PINNED = {
    "len": lambda y, c: y / len(y[0]),
    "int": lambda y, c: y / float(int(c)),
    "numpy": lambda y, c: y / torch.tensor(np.prod(y.shape[1:2])),
}
#: what leaves no trace but a constant or a branch of the smaller network
UNSEEN = {
    "text": lambda y, c: y / torch.tensor(float(str(c))),
    "torch.Size.numel": lambda y, c: y / torch.tensor(float(y[0].shape.numel())),
    "as many ones": lambda y, c: y / torch.tensor([1.0] * c).sum(),
    "a range": lambda y, c: y / torch.tensor([float(i + 1) for i in range(c)]).sum(),
    "a branch": lambda y, c: y * 2 if c > 12 else y,
}


def _attention(y, scale):
    tokens = y.flatten(2).transpose(1, 2)[:, None]
    return (
        F.scaled_dot_product_attention(tokens, tokens, tokens, scale=scale)[:, 0].transpose(1, 2).view_as(y)
    )


def _net(function):
    conv = nn.Conv2d(3, 16, 3, padding=1)
    return Net(
        lambda net, x: net.o(function(net.f(x), net.f(x).shape[1])), f=conv, o=nn.Conv2d(16, 4, 1)
    ).eval()


@pytest.mark.parametrize("way", FOLLOWED)
def test_units_whose_number_scales_the_others_are_told(way):
    net, x = _net(FOLLOWED[way]), torch.randn(1, 3, 8, 8)
    graph = trace(net, x)
    units = graph.layers["f.weight"][:5]
    assert set(units.tolist()) <= set(graph.statistics_units.tolist())
    expected = copy.deepcopy(net)  # the same code with eleven filters
    expected.f, expected.o = nn.Conv2d(3, 11, 3, padding=1), nn.Conv2d(11, 4, 1)
    expected.f.weight.data, expected.f.bias.data = net.f.weight.data[5:], net.f.bias.data[5:]
    expected.o.weight.data, expected.o.bias.data = net.o.weight.data[:, 5:], net.o.bias.data
    prune_(net, graph, units)
    torch.testing.assert_close(net(x), expected(x))


@pytest.mark.parametrize("way", PINNED)
def test_units_whose_number_becomes_plain_are_pinned(way):
    graph = trace(_net(PINNED[way]), torch.randn(1, 3, 8, 8))
    assert "is made plain by int() or len()" in graph.pinned[int(graph.layers["f.weight"][0])]


@pytest.mark.parametrize("way", UNSEEN)
def test_cut_that_changes_an_unseen_number_is_refused_with_its_units(way):
    net, x = _net(UNSEEN[way]), torch.randn(1, 3, 8, 8)
    before = net(x)
    graph = trace(net, x)
    units = graph.layers["f.weight"][:5]
    with pytest.raises(SurgeryError, match="rolled back") as raised:
        prune_(net, graph, units)
    assert set(units.tolist()) <= set(raised.value.units.tolist())
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_followed_number_does_not_excuse_an_unseen_one_elsewhere():
    net = Net(
        lambda net, x: (
            net.o(net.f(x) / torch.tensor(net.f(x).shape[1])),
            net.p(net.g(x) / float(str(net.g(x).shape[1]))),
        ),
        f=nn.Conv2d(3, 8, 1), g=nn.Conv2d(3, 8, 1), o=nn.Conv2d(8, 2, 1), p=nn.Conv2d(8, 2, 1),
    ).eval()  # fmt: skip
    graph = trace(net, torch.randn(1, 3, 8, 8))
    followed, unseen = graph.layers["f.weight"][:3], graph.layers["g.weight"][:3]
    for units in (unseen, [*followed, *unseen]):
        with pytest.raises(SurgeryError, match="gets the number") as raised:
            prune_(net, graph, units)
        assert set(unseen.tolist()) <= set(raised.value.units.tolist())
    prune_(net, graph, followed)
    assert net.o.in_channels == 5
