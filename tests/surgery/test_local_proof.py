"""The proof without a forward accepts cuts of common networks, and none that the whole proof refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.surgery import proof
from tests.support import hidden_reads
from tests.support.random_cuts import random_units

COMMON: dict[str, Callable[[], nn.Module]] = {
    "resnet": torchvision.models.resnet18,
    "mobilenet": torchvision.models.mobilenet_v2,
    "mobilenet v3": torchvision.models.mobilenet_v3_small,
    "densenet": torchvision.models.densenet121,
    "efficientnet": torchvision.models.efficientnet_b0,
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
    "regnet": lambda: timm.create_model("regnetx_002"),
    "unet": lambda: smp.Unet("resnet18", encoder_weights=None),
    "vgg": torchvision.models.vgg11_bn,
}


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The answers of the proof without a forward; the whole proof is made in any case."""
    given: list[bool] = []
    is_proven = proof.is_proven

    def ask(*arguments: Any) -> bool:
        given.append(is_proven(*arguments))
        return False

    monkeypatch.setattr(proof, "is_proven", ask)
    return given


def cut_randomly(net: nn.Module, example: Tensor, share: float = 0.5) -> None:
    graph = trace(net, example)
    prune_(net, graph, random_units(graph, np.random.default_rng(0), share, graph.prunable))


@pytest.mark.parametrize("name", COMMON)
def test_cuts_of_common_networks_need_no_forward(name: str, verdicts: list[bool]):
    net = COMMON[name]()
    for _ in range(2):
        cut_randomly(net, torch.zeros(1, 3, 64, 64), 0.3)
    assert verdicts == [True, True]


class Branches(nn.Module):
    """Takes another way when a number of channels is small, as one of several functions reads it."""

    def __init__(self, is_small: Callable[[nn.Module, Tensor], bool]) -> None:
        super().__init__()
        self.first, self.last, self.is_small = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), is_small

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.relu() if self.is_small(self, y) else y)


READERS: dict[str, Callable[[Any, Tensor], bool]] = {
    "shape": lambda net, x: x.shape[1] < 8,
    "size": lambda net, x: x.size(1) < 8,
    "whole shape": lambda net, x: tuple(x.shape) < (1, 8),
    "attribute": lambda net, x: net.first.out_channels < 8,
    "by name": lambda net, x: getattr(net.last, "in_" + "channels") < 8,
    "weight": lambda net, x: net.first.weight.shape[0] < 8,
    "strides": lambda net, x: x.stride(0) < 8 * 36,
    "alias": lambda net, x: x.data.shape[1] < 8,
    "dictionary": hidden_reads.is_small,
}


@pytest.mark.parametrize("reader", READERS)
def test_code_that_reads_numbers_of_channels_is_run_again(reader: str, verdicts: list[bool]):
    net = (
        hidden_reads.Network(Branches(READERS[reader]))
        if reader == "dictionary"
        else Branches(READERS[reader])
    )
    with pytest.raises(SurgeryError, match="in the smaller network only"):
        cut_randomly(net, torch.zeros(1, 3, 8, 8))
    assert verdicts == [False]


def test_a_network_that_was_changed_since_its_trace_is_run_again(verdicts: list[bool]):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    net[1] = nn.Softmax(1)
    with pytest.raises(SurgeryError):
        prune_(net, graph, graph.prunable[:4])
    assert verdicts == [False]


def test_a_hook_that_was_added_since_the_trace_is_run(verdicts: list[bool]):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    net[1].register_forward_hook(lambda module, args, out: out.softmax(1))
    with pytest.raises(SurgeryError):
        prune_(net, graph, graph.prunable[:4])
    assert verdicts == [False]


@pytest.mark.parametrize("left", [1, 2])
def test_a_single_remaining_channel_is_run(left: int, verdicts: list[bool]):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    prune_(net, graph, graph.prunable[left:])
    assert verdicts == [left > 1]


def test_the_costs_are_compared(monkeypatch: pytest.MonkeyPatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    model = graph.cost_models["macs"]
    per_term = type(model).per_term
    monkeypatch.setattr(type(model), "per_term", lambda self, kept: per_term(self, kept) * 2)
    with pytest.raises(SurgeryError, match="MACs"):
        prune_(net, graph, graph.prunable[:4])
