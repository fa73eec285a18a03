"""On trained networks, repaired outputs are nearer to the dense ones than those with recalibrated norms."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import L2, Random, prune_, select, trace
from lightning_prune.compensation.repair import cut_and_compensate_
from lightning_prune.utils.batch_norm import recalibrate_
from tests.support.nets import Net


def gratings(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of stripes with noise, and which of six directions the stripes have."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (number,), generator=generator)
    angle = (labels * math.pi / 6)[:, None, None]
    phase = 2 * math.pi * torch.rand(number, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.sin(1.2 * (rows * angle.cos() + columns * angle.sin()) + phase)
    return (waves + 0.5 * torch.randn(number, 16, 16, generator=generator))[:, None], labels


def residual_network() -> nn.Module:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.stem(x)))
        x = F.relu(x + net.first(x))
        x = F.relu(net.down_norm(net.down(x)))
        return net.head(F.relu(x + net.second(x)).mean((2, 3)))

    def block(width: int) -> nn.Module:
        inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        return nn.Sequential(inner, nn.BatchNorm2d(width), nn.ReLU(), outer, nn.BatchNorm2d(width))

    down = nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False)
    parts = {
        "stem": nn.Conv2d(1, 12, 3, padding=1, bias=False),
        "norm": nn.BatchNorm2d(12),
        "first": block(12),
    }
    more = {"down": down, "down_norm": nn.BatchNorm2d(24), "second": block(24), "head": nn.Linear(24, 6)}
    return Net(run, **parts, **more)


@functools.cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = residual_network()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(80):
        images, labels = gratings(64, seed=step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("criterion", [L2(), Random(0), Random(1)], ids=["L2", "Random 0", "Random 1"])
def test_repaired_outputs_are_nearer_than_recalibrated_ones(criterion, share):
    dense = trained()
    images, _ = gratings(128, seed=1000)
    new, labels = gratings(512, seed=1001)
    repaired, recalibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    for model in (repaired, recalibrated):
        graph = trace(model, images[:2])
        plan = select(graph, criterion(graph, model, {}), {"macs": share})
        if model is repaired:
            _, report = cut_and_compensate_(model, graph, plan, [images])
        else:
            prune_(model, graph, plan)
            recalibrate_(model, [((images,), {})])
    with torch.no_grad():
        expected = dense(new)
        distances = [float((m(new) - expected).square().mean()) for m in (repaired, recalibrated)]
        accuracies = [
            float((m(new).argmax(1) == labels).float().mean()) for m in (dense, repaired, recalibrated)
        ]
    assert report.accepted
    assert distances[0] < 0.6 * distances[1]
    assert accuracies[1] > accuracies[2] - 0.01
