"""A default device of the process, ``torch.set_default_device``, is the network's business only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import L2, one_shot, prune_, trace
from lightning_prune.compensation import CompensationSettings


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    """Create tensors on the meta device by default, as a script for a GPU does on that."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, device="cpu"), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, stride=2, device="cpu"),
        nn.BatchNorm2d(8, device="cpu"), nn.ReLU(), nn.Conv2d(8, 2, 1, device="cpu"),
    )  # fmt: skip


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("passes", [0, 2])
def test_a_network_is_pruned_and_repaired(passes: int):
    net, images = network(), torch.rand(8, 3, 8, 8, device="cpu")
    settings = CompensationSettings(refine_passes=passes)
    one_shot(net, images[:1], {"macs": 0.5}, L2(), batches=[images], compensate=settings)
    assert net[0].out_channels < 12
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    assert net(images).shape == (8, 2, 12, 12)


@pytest.mark.usefixtures("_elsewhere")
def test_the_forward_that_is_traced_creates_its_tensors_on_the_default_device():
    devices: list[str] = []

    class Shifting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            devices.append(torch.get_default_device().type)
            return super().forward(x)

    net = Shifting(*network())
    graph = trace(net, torch.rand(1, 3, 8, 8, device="cpu"))
    prune_(net, graph, graph.layers["0.weight"][:6])
    assert len(devices) > 1  # in the trace and in the proof
    assert set(devices) == {"meta"}
