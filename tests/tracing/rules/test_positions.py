"""Operators that select, order, transform or write along positions keep the channels free, and cut them right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, RoIPool, roi_align

from lightning_prune import prune_, trace
from lightning_prune.testing import with_dead_filters

REVERSED = torch.arange(64).flip(0)
THREE = torch.tensor([3, 1, 2])
BOXES = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])] * 2


class Between(nn.Module):
    """Two convolutions with ``function(net, x)`` between them, which keeps the channels of ``x``."""

    def __init__(self, function, **parts) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part())

    def forward(self, x):
        return self.c(self.b(self.function(self, self.a(x).relu())).relu())


def tokens(function):
    """Let ``function`` see the pixels as tokens, (n, positions, channels)."""

    def run(net, x):
        changed = function(x.flatten(2).transpose(1, 2))
        return changed.transpose(1, 2)[..., None]

    return run


def padded(net, x):
    return nn.utils.rnn.pad_sequence([image.flatten(1).t() for image in x], batch_first=True).transpose(1, 2)[
        ..., None
    ]


def written(value):
    def run(net, x):
        y = x.clone()
        y[:, :, :2] = value(x)
        return y

    return run


def written_by_index(net, x):
    y = x.clone()
    y[:, :, torch.tensor([1, 2])] = 0
    return y


def rows(t):
    return REVERSED[None, :, None].expand_as(t)


CASES = {
    "fft": (lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]), {}),
    "fft, real view": (lambda net, x: torch.view_as_real(torch.fft.rfft2(x)).sum(-1), {}),
    "fft, magnitude": (lambda net, x: torch.fft.fft2(x).abs(), {}),
    "fft, a weight per frequency": (
        lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(net.w), s=x.shape[-2:]),
        {"w": lambda: nn.Parameter(torch.randn(8, 8, 5, 2))},
    ),
    "pad_sequence": (padded, {}),
    "a number into a region": (written(lambda x: 0), {}),
    "a tensor into a region": (written(lambda x: x[:, :, 2:4]), {}),
    "a number by an index": (written_by_index, {}),
    "gather": (tokens(lambda t: t.gather(1, rows(t))), {}),
    "gather by its own order": (tokens(lambda t: t.gather(1, t.argsort(1))), {}),
    "scatter": (tokens(lambda t: torch.zeros_like(t).scatter(1, rows(t), t)), {}),
    "scatter_add_": (tokens(lambda t: torch.zeros_like(t).scatter_add_(1, rows(t), t)), {}),
    "scatter_reduce": (tokens(lambda t: t.scatter_reduce(1, torch.zeros_like(t).long(), t, "sum")), {}),
    "index_add": (tokens(lambda t: t.index_add(1, THREE, t[:, :3])), {}),
    "index_copy": (tokens(lambda t: t.index_copy(1, THREE, t[:, :3] * 2)), {}),
    "index_fill": (tokens(lambda t: t.index_fill(1, THREE, 0)), {}),
    "index_select": (tokens(lambda t: t.index_select(1, REVERSED)), {}),
    "cumsum": (tokens(lambda t: t.cumsum(1)), {}),
    "cummax": (tokens(lambda t: t.cummax(1)[0]), {}),
    "quantile": (tokens(lambda t: t - t.quantile(0.5, 1, keepdim=True)), {}),
    "kthvalue": (tokens(lambda t: t - t.kthvalue(3, 1, keepdim=True)[0]), {}),
    "topk": (tokens(lambda t: t.topk(5, 1)[0]), {}),
    "cdist": (tokens(lambda t: (-torch.cdist(t, t, p=1)).softmax(-1) @ t), {}),
    "bucketize": (lambda net, x: x * torch.bucketize(x, torch.tensor([0.1, 0.5])), {}),
    "fake quantisation": (lambda net, x: torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127), {}),
    "fake quantisation per channel": (
        lambda net, x: torch.fake_quantize_per_channel_affine(x, net.scale, net.zero, 1, -128, 127),
        {
            "scale": lambda: nn.Parameter(torch.rand(8) / 100 + 0.01, requires_grad=False),
            "zero": lambda: nn.Parameter(torch.zeros(8), requires_grad=False),
        },
    ),
    "channels in the batch": (
        lambda net, x: F.conv2d(x.reshape(-1, 1, *x.shape[2:]), net.blur, padding=1).reshape(x.shape),
        {"blur": lambda: nn.Parameter(torch.rand(1, 1, 3, 3))},
    ),
    "deformable convolution": (
        lambda net, x: net.deform(x, net.offset(x), net.mask(x).sigmoid()),
        {
            "deform": lambda: DeformConv2d(8, 8, 3, padding=1),
            "offset": lambda: nn.Conv2d(8, 18, 3, padding=1),
            "mask": lambda: nn.Conv2d(8, 9, 3, padding=1),
        },
    ),
    "roi_align": (lambda net, x: roi_align(x, BOXES, 4), {}),
    "roi_pool": (lambda net, x: RoIPool(4, 1.0)(x, BOXES), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_are_free_and_cut_right(case):
    function, parts = CASES[case]
    net, x = Between(function, **parts).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    units = graph.layers["a.weight"][[1, 4, 5]]
    assert set(units.tolist()) <= set(graph.prunable.tolist()), graph.pinned
    dense = with_dead_filters(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    torch.testing.assert_close(net(x), dense(x), rtol=1e-4, atol=1e-4)


def test_gumbel_softmax_along_positions_leaves_channels_free():
    net = Between(tokens(lambda t: F.gumbel_softmax(t, dim=1, hard=True))).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    prune_(net, graph, graph.layers["a.weight"][:3])
    assert net(x).shape == (2, 2, 64, 1)


def test_deformable_convolution_costs_what_a_convolution_does():
    parts = {
        "deform": lambda: DeformConv2d(8, 8, 3, padding=1),
        "offset": lambda: nn.Conv2d(8, 18, 3, padding=1),
    }
    deformable = Between(lambda net, x: net.deform(x, net.offset(x)), **parts)
    plain = Between(
        lambda net, x: net.deform(x) + 0 * net.offset(x).sum(),
        **{**parts, "deform": lambda: nn.Conv2d(8, 8, 3, padding=1)},
    )
    x = torch.zeros(1, 3, 8, 8)
    assert trace(deformable, x).cost("macs") == trace(plain, x).cost("macs")


def test_groups_of_a_deformable_convolution_keep_the_same_channels():
    parts = {
        "deform": lambda: DeformConv2d(8, 8, 3, padding=1, groups=2),
        "offset": lambda: nn.Conv2d(8, 18, 3, padding=1),
    }
    net, x = Between(lambda net, x: net.deform(x, net.offset(x)), **parts).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    units = graph.layers["a.weight"][:1]
    dense = with_dead_filters(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    assert (net.a.out_channels, net.deform.weight.shape[1]) == (6, 3)
    torch.testing.assert_close(net(x), dense(x))
