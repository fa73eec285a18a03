"""The proof without a forward accepts cuts of common networks, and none that the whole proof refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

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
    "convnext": lambda: timm.create_model("convnext_atto"),
    "padding": lambda: smp.Unet("efficientnet-b0", encoder_weights=None),
    "channel dropout": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(), nn.Conv2d(8, 2, 1)),
    "vgg": torchvision.models.vgg11_bn,
    "group norm": lambda: torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(8, c)),
    "ghostnet": lambda: timm.create_model("ghostnet_050"),
    "response norm": lambda: timm.create_model("convnextv2_atto"),
    "rms norm": lambda: timm.create_model("convnext_atto_rms"),
    "normalised": lambda: timm.create_model("swiftformer_xs"),
    "linknet": lambda: smp.Linknet("resnet18", encoder_weights=None),
    "segformer": lambda: smp.Segformer("resnet18", encoder_weights=None),
    "upernet": lambda: smp.UPerNet("resnet18", encoder_weights=None),
    "empty features": lambda: smp.UnetPlusPlus("tu-convnext_atto", encoder_weights=None),
    "padded to stride": lambda: smp.DeepLabV3Plus("tu-convnext_atto", encoder_weights=None),
    "dropout in training": lambda: torchvision.models.googlenet(init_weights=False),
}


@pytest.fixture(autouse=True)
def _any_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks of these tests be proven without a forward as those of known packages are."""
    monkeypatch.setattr("lightning_prune.surgery.proof.is_known_code", lambda model: True)


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


class Norm(nn.LayerNorm):
    """Normalises channels of images in one of several ways."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(8)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def normed(way: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Norm(way), nn.ReLU(), nn.Conv2d(8, 2, 1))


def whole(net: Any, y: Tensor) -> Tensor:
    return F.layer_norm(y, net.normalized_shape, net.weight, net.bias, net.eps)


def by_name(net: Any, y: Tensor) -> Tensor:
    return F.layer_norm(y, normalized_shape=net.normalized_shape, weight=net.weight, bias=net.bias)


def through_another(net: Any, y: Tensor) -> Tensor:
    return helper(F.layer_norm, net.normalized_shape, net, y)


def helper(function: Callable[..., Tensor], sizes: tuple[int, ...], net: Any, y: Tensor) -> Tensor:
    return function(y, sizes, net.weight, net.bias)


@pytest.mark.parametrize("way", [whole, by_name])
def test_a_norm_that_gets_the_sizes_of_its_module_needs_no_forward(
    way: Callable[[Any, Tensor], Tensor], verdicts: list[bool]
):
    cut_randomly(normed(way), torch.zeros(1, 3, 8, 8))
    assert verdicts == [True]


def test_a_norm_whose_sizes_other_code_has_seen_is_run(verdicts: list[bool]):
    cut_randomly(normed(through_another), torch.zeros(1, 3, 8, 8))
    assert verdicts == [False]


def test_a_norm_whose_sizes_are_not_those_that_survive_is_not_proven(monkeypatch: pytest.MonkeyPatch):
    net = normed(whole)
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    given: list[bool] = []
    is_proven = proof.is_proven

    def ask(graph: Any, kept: Any, changes: Any) -> bool:
        given.append(is_proven(graph, kept, changes))
        wrong = {key: (7,) if key[1] == "normalized_shape" else value for key, value in changes.items()}
        net[1].normalized_shape = (7,)
        given.append(is_proven(graph, kept, wrong))
        net[1].normalized_shape = (4,)
        return True

    monkeypatch.setattr(proof, "is_proven", ask)
    prune_(net, graph, graph.prunable[:4])
    assert given == [True, False]


class GroupNorm(nn.GroupNorm):
    """Normalises in as many groups as another function says."""

    def __init__(self, groups: int, way: Callable[[nn.Module], int]) -> None:
        super().__init__(groups, 8)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.way(self), self.weight, self.bias, self.eps)


GROUPS: dict[str, Callable[[], nn.Module]] = {
    "instances": lambda: nn.GroupNorm(8, 8),
    "pairs": lambda: nn.GroupNorm(4, 8),
    "one": lambda: nn.GroupNorm(1, 8),
    "passed": lambda: GroupNorm(2, lambda net: 2),
    "computed": lambda: GroupNorm(8, lambda net: net.num_groups * 1),
}


@pytest.mark.parametrize("name", GROUPS)
def test_cuts_under_group_norms_are_as_the_whole_proof_says(name: str, verdicts: list[bool]):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), GROUPS[name](), nn.ReLU(), nn.Conv2d(8, 2, 1))
    cut_randomly(net, torch.zeros(1, 3, 8, 8))
    assert verdicts == [name != "computed"]
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 2, 6, 6)


def test_a_number_of_norm_groups_that_does_not_fit_is_not_proven(monkeypatch: pytest.MonkeyPatch):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    given: list[bool] = []
    is_proven = proof.is_proven

    def ask(graph: Any, kept: Any, changes: Any) -> bool:
        wrong = {key: 2 if key[1] == "num_groups" else value for key, value in changes.items()}
        given.extend((is_proven(graph, kept, changes), is_proven(graph, kept, wrong)))
        return True

    monkeypatch.setattr(proof, "is_proven", ask)
    prune_(net, graph, graph.prunable[:4])
    assert given == [True, False]


class Optional(nn.Module):
    """Leaves out what has no channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 0 else x.relu()


def test_code_that_asks_for_emptiness_needs_no_forward(verdicts: list[bool]):
    cut_randomly(nn.Sequential(nn.Conv2d(3, 8, 3), Optional(), nn.Conv2d(8, 2, 1)), torch.zeros(1, 3, 8, 8))
    assert verdicts == [True]


class Strided(nn.Conv2d):
    """Passes its number of groups as its stride as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.groups, 0, 1, self.groups)


def test_a_number_of_groups_that_is_also_a_stride_is_not_proven(verdicts: list[bool]):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Strided(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1))
    with contextlib.suppress(SurgeryError):
        cut_randomly(net, torch.zeros(1, 3, 16, 16))
    assert True not in verdicts


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
