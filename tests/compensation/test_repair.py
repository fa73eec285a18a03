"""Repairs bring the outputs nearer to the dense ones, exactly where that is possible."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from lightning_prune.compensation import cut_and_compensate_
from lightning_prune.testing import randomise_
from tests.support.nets import Net, random_units
from tests.support.repairs import IMAGES, NETWORKS, TOKENS, encoder, repaired


def double_channels(weight: Tensor, dim: int = 0) -> None:
    """Make the second half of a weight's filters twice its first half."""
    with torch.no_grad():
        first, second = weight.chunk(2, dim)
        second.copy_(2 * first)


@pytest.mark.parametrize(
    "consumer",
    [
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 4, 3, bias=False),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1),
        nn.Sequential(nn.Unflatten(2, (3, 4)), nn.ConvTranspose3d(8, 4, 3, stride=2)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 4, 3)),
        nn.Sequential(nn.Unflatten(2, (3, 4)), nn.Conv3d(8, 4, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ],
    ids=lambda consumer: type(consumer[-1] if isinstance(consumer, nn.Sequential) else consumer).__name__,
)
def test_what_other_channels_say_is_recovered(consumer):
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    double_channels(stem.weight)
    consumer = randomise_(copy.deepcopy(consumer))  # parameters are drawn here: collection has no fixed seed
    model = nn.Sequential(stem, nn.ReLU(), consumer).double()
    report = repaired(model, IMAGES.double(), remove=("0.weight", slice(4, 8)))
    assert report.accepted
    assert report.change_before > 0.05
    assert report.change_after < 1e-7


@pytest.mark.parametrize("bias", [True, False])
def test_constant_channels_go_into_the_bias_or_the_norm_behind(bias):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    )
    randomise_(model)
    with torch.no_grad():
        model[1].weight[4:] = 0
        model[1].bias[4:] = 3
    weight, mean = model[3].weight.clone(), model[4].running_mean.clone()
    report = repaired(model, IMAGES, remove=("0.weight", slice(4, 8)))
    assert report.accepted
    assert report.change_after < 1e-8 < 1e-2 < report.change_before
    torch.testing.assert_close(model[3].weight, weight[:, :4], atol=1e-4, rtol=1e-3)
    assert torch.equal(model[4].running_mean, mean) == bias


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_come_nearer_also_on_new_images(name, seed):
    build, inputs = NETWORKS[name]
    model = build().eval()
    new = torch.randn(64, *inputs.shape[1:], generator=torch.Generator().manual_seed(7))
    expected = model(new).detach()
    cut = copy.deepcopy(model)
    graph = trace(cut, inputs[:2])
    prune_(cut, graph, random_units(graph, seed, 0.4))
    report = repaired(model, inputs, seed=seed)
    assert report.accepted, report
    assert report.change_after < 0.7 * report.change_before
    assert not report.left_alone
    assert (model(new) - expected).square().mean() < 0.9 * (cut(new) - expected).square().mean()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_projections_of_attention_are_repaired():
    model = nn.Sequential(nn.Linear(12, 12), encoder(), nn.Linear(12, 3))
    report = repaired(model, TOKENS)
    changed = {name for name, layer in report.layers.items() if layer.changed}
    assert {f"1.layers.1.self_attn.{part}" for part in "qkv"} <= changed
    assert "1.layers.1.self_attn.out_proj" in report.layers


def test_an_attention_with_separate_projections_is_repaired():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        query = F.relu(net.stem(x))
        return net.attention(query, key=net.keys(x), value=x, need_weights=False)[0] + net.head(query)

    attention = nn.MultiheadAttention(16, 2, kdim=10, vdim=12, batch_first=True)
    model = Net(
        run, stem=nn.Linear(12, 16), keys=nn.Linear(12, 10), attention=attention, head=nn.Linear(16, 16)
    )
    report = repaired(model, TOKENS, remove=("keys.weight", slice(0, 4)))
    assert report.accepted
    assert report.layers["attention.k"].after < 0.9 * report.layers["attention.k"].before


def test_parameters_given_to_a_function_are_repaired():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        return F.linear(net.hidden(net.stem(x).relu()).relu(), net.head.weight, bias=net.head.bias)

    model = Net(run, stem=nn.Linear(12, 16), hidden=nn.Linear(16, 16), head=nn.Linear(16, 3))
    report = repaired(model, TOKENS, remove=("hidden.weight", slice(0, 6)))
    assert report.layers["head"].changed
    assert report.layers.keys() == {"head"}


def test_padding_and_dilation_that_were_changed_after_construction_are_those_of_the_forward():
    """As smp's DeepLab does: strides of its encoder are replaced by dilation when it is built."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
    )
    net.eval()[2].dilation = net[2].padding = (4, 4)
    for tensor in (net[0].weight.data, net[0].bias.data):
        tensor[1] = tensor[0]  # what is removed can be replaced exactly
    images = torch.rand(32, 3, 9, 9)
    dense = net(images)
    graph = trace(net, images[:1])
    _, report = cut_and_compensate_(net, graph, graph.layers["0.weight"][1:2], [images])
    assert report.accepted
    torch.testing.assert_close(net(images), dense, rtol=1e-3, atol=1e-3)
