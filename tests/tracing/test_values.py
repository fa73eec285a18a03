"""Networks that cache values, take branches by values, or use operators without a fake kernel."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import nms

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.testing import with_dead_filters
from tests.support.nets import Net


@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """Double ``x``; its fake kernel accepts nothing."""
    return x * 2


@twice.register_fake
def _(x):
    raise RuntimeError("expected bfloat16")


class CachedScale(nn.Module):
    """Caches in eval mode what it computes of a parameter, and drops it when training begins, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.log_scale = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Parameter(torch.randn(8))
        self.cache = {}

    def train(self, mode: bool = True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if not self.training and "scale" not in self.cache:
            self.cache["scale"] = self.log_scale.exp()
        scale = self.log_scale.exp() if self.training else self.cache["scale"]
        return self.b(self.a(x) * scale[:, None, None])


@pytest.mark.parametrize("num_kept", [5, 1])
@pytest.mark.parametrize("by_record", [False, True])
def test_values_cached_in_eval_mode_are_dropped_by_a_cut(num_kept, by_record):
    net, x = CachedScale().eval().requires_grad_(False), torch.randn(1, 3, 8, 8)
    net(x)
    other = copy.deepcopy(net)
    graph = trace(net, x)
    record = prune_(net, graph, graph.prunable[num_kept:])
    small = record.apply_(other) if by_record else net
    assert not small.training
    cached = small(x)
    torch.testing.assert_close(cached, copy.deepcopy(small).train()(x))


class Branches(nn.Module):
    """Takes one of two layers by the sign of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), nn.Conv2d(12, 8, 3)
        self.d, self.free = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        h = self.a(x).relu()
        return self.free(self.d(self.b(h) if x.mean() > 0 else self.c(h)))


def test_channels_that_a_branch_not_taken_could_read_or_write_are_pinned():
    net, x = Branches().eval(), torch.ones(1, 3, 8, 8)
    graph = trace(net, x)
    for layer in ("a.weight", "b.weight"):
        with pytest.raises(SurgeryError, match="could be read by c in a branch that no example takes"):
            prune_(net, graph, graph.layers[layer][:5])
    assert any("no example reaches c" in note for note in graph.notes)
    prune_(net, graph, graph.layers["d.weight"][:2])
    assert net(-x).shape == net(x).shape


def test_layer_that_no_example_reaches_may_call_anything_its_groups():
    net, x = Branches().eval(), torch.ones(1, 3, 8, 8)
    net.c.groups = ["first", "second"]
    assert any("no example reaches c" in note for note in trace(net, x).notes)


def test_further_examples_reach_other_branches():
    net, x = Branches().eval(), torch.ones(1, 3, 8, 8)
    graph = trace(net, x, others=[-x])
    assert not any("reaches" in note for note in graph.notes)
    dense = copy.deepcopy(net)
    units = graph.layers["a.weight"][:5]
    dense.a.weight.data[:5], dense.a.bias.data[:5] = 0, 0
    assert graph.cost("macs") == trace(net, x).cost("macs")
    prune_(net, graph, units)
    for example in (x, -x):
        torch.testing.assert_close(net(example), dense(example))


def test_layers_that_a_network_without_branches_never_uses_pin_nothing():
    net = Net(
        lambda net, x: net.b(net.a(x)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 2, 1), unused=nn.Conv2d(8, 8, 1)
    )
    assert len(trace(net, torch.zeros(1, 3, 8, 8)).prunable) == 8


def detect(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes, and their scores, that suppression leaves: as many as the values say."""
    features = net.body(x).relu()
    corner, size = net.box(features).flatten(2)[0].T.split(2, 1)
    boxes, scores = torch.cat([corner, corner + size.abs() + 0.1], 1), net.score(features).flatten()
    kept = nms(boxes, scores, 0.5)
    return boxes[kept], scores[kept]


def test_network_that_returns_as_many_boxes_as_values_say_is_cut_right():
    net = Net(detect, body=nn.Conv2d(3, 16, 3, padding=1), box=nn.Conv2d(16, 4, 1), score=nn.Conv2d(16, 1, 1))
    x = torch.randn(1, 3, 16, 16)
    graph = trace(net, x)
    units = graph.layers["body.weight"][:6]
    dense = with_dead_filters(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    assert net.box.in_channels == 10
    for image in (x, torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8)):
        torch.testing.assert_close(net(image), dense(image), rtol=1e-4, atol=1e-5)


def test_operator_whose_fake_kernel_refuses_is_run_for_real():
    net = Net(
        lambda net, x: net.c(net.b(twice(net.a(x))).relu()),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 12),
        c=nn.Linear(12, 3),
    )
    x = torch.randn(2, 8)
    state, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    graph = trace(net, x)
    assert any("runs on real tensors only (RuntimeError: expected bfloat16" in note for note in graph.notes)
    assert len(graph.prunable) == 12
    assert list(graph.unsupported) == ["tests::twice"]
    assert torch.equal(random_state, torch.get_rng_state())
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    prune_(net, graph, graph.prunable[:4])
    assert net(x).shape == (2, 3)


class Halves(nn.Module):
    """Code of its own without parameters: multiplies halves of ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x):
        return torch.cat([x[:, : self.width] * x[:, self.width :], x[:, : self.width]], 1)


class Inner(nn.Module):
    """Calls a module with code of its own for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.halves, self.b = nn.Conv2d(3, 8, 1), Halves(4), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(self.halves(y) if x.mean() < 0 else y)


def test_channels_that_a_module_not_run_could_read_are_pinned_where_it_is_called():
    net, x = nn.Sequential(Inner(), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval(), torch.ones(1, 3, 8, 8)
    graph = trace(net, x)
    for unit in graph.layers["0.a.weight"]:
        assert "could be read by 0.halves in a branch that no example takes" in graph.pinned[unit]
    assert any("no example reaches 0.halves" in note for note in graph.notes)
    graph = trace(net, x, others=[-x])
    dense = copy.deepcopy(net)
    units = np.unique(graph.layers["0.a.weight"][[1, 5]])
    assert len(units) == 1
    dense[0].b.weight.data[:, [1, 5]] = 0
    prune_(net, graph, units)
    assert net[0].halves.width == 3
    for example in (x, -x):
        torch.testing.assert_close(net(example), dense(example))
