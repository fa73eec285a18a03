"""CIFAR-style residual networks: published sizes, shortcuts, and cuts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.classification import cifar_resnet
from lightning_prune.classification.networks.cifar_resnet import PaddedShortcut
from lightning_prune.testing import error, randomise_, with_dead_filters


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)],  # He et al., table 6
)
def test_sizes_are_the_published_ones(depth, millions):
    net = cifar_resnet(depth, in_channels=3, shortcut="A")
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)
    assert sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in net.modules()) == depth


def test_macs_of_resnet_56_are_those_of_the_published_tables():
    """127.12 M in Torch-Pruning's table, which counts norms too; He et al. state none."""
    net = cifar_resnet(56, in_channels=3).eval()
    macs = []
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(
                lambda layer, _, out: macs.append(layer.weight.numel() * out[0].numel() // out.shape[1])
            )
    net(torch.zeros(1, 3, 32, 32))
    assert sum(macs) / 1e6 == pytest.approx(125.8, abs=0.2)


def test_the_padded_shortcut_subsamples_and_adds_zeros_on_both_sides():
    x = torch.rand(2, 4, 6, 6)
    y = PaddedShortcut(new_channels=4, stride=2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 6:].abs().sum() == 0


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth}: give 6 n"):
        cifar_resnet(depth)
    with pytest.raises(ValueError, match="shortcut"):
        cifar_resnet(20, shortcut="C")


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_cut_of_every_third_unit_gives_what_dead_filters_give(shortcut):
    dense = randomise_(cifar_resnet(14, in_channels=1, width=8, shortcut=shortcut)).double().eval()
    image = torch.randn(2, 1, 16, 16).double()
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, image)
    remove = graph.prunable[::3]
    prune_(pruned, graph, remove)
    assert len(remove) > 30
    assert error(with_dead_filters(dense, graph, remove), pruned, image) < 1e-12
