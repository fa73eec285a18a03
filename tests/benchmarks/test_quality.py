"""``python -m benchmarks.quality``: tasks, floors, one protocol for all methods, and the page."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.quality.data import Part
from benchmarks.quality.networks import Uniform, floors_of, macs_of, policy, thinner
from benchmarks.quality.resnet import ResNet
from benchmarks.quality.tasks import TASKS, dense, make_task, score
from benchmarks.quality.training import batches_of, factor, fit
from lightning_prune import one_shot, trace
from lightning_prune.criteria import L2

EXAMPLE = torch.zeros(1, 1, 8, 8)


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1))


def test_a_floor_is_four_channels_or_an_eighth_whatever_is_more():
    assert floors_of(chain(3, 12, 64), EXAMPLE) == {"0": 3, "2": 4, "4": 8, "6": 2}


def test_no_cut_goes_below_the_floors_and_one_to_the_floors_can_be_made():
    net = chain(16, 64)
    floors = floors_of(net, EXAMPLE)
    one_shot(net, EXAMPLE, policy(net, EXAMPLE, 64 * (4 * 9 + 4 * 8 * 9 + 8 * 2), floors), L2())
    assert trace(net, EXAMPLE).widths() == {"0.weight": 4, "2.weight": 8, "4.weight": 2}
    with pytest.raises(ValueError, match="cannot be met"):
        policy(net, EXAMPLE, 64 * (4 * 9 + 4 * 8 * 9 + 8 * 2) - 1, floors).check(trace(net, EXAMPLE))


def test_uniform_scores_are_ranks_within_each_layer():
    net = chain(4, 2)
    with torch.no_grad():
        for layer, sizes in ((net[0], [3.0, 1.0, 4.0, 2.0]), (net[2], [900.0, 800.0])):
            layer.weight.copy_(torch.tensor(sizes)[:, None, None, None])
    graph = trace(net, EXAMPLE)
    scores = Uniform(L2())(graph, net)
    assert scores[graph.layers["0.weight"]].tolist() == [0.75, 0.25, 1.0, 0.5]
    assert scores[graph.layers["2.weight"]].tolist() == [1.0, 0.5]


def test_a_thinner_network_loses_the_same_share_everywhere_and_has_new_weights():
    net = ResNet(1)
    example = torch.zeros(1, 1, 14, 14)
    dense_macs = macs_of(net, example)
    thin = thinner(net, example, dense_macs / 4, floors_of(net, example), seed=0)
    assert 0.23 * dense_macs < macs_of(thin, example) <= dense_macs / 4
    before, after = trace(net, example).widths(), trace(thin, example).widths()
    shares = np.array([after[name] / width for name, width in before.items() if name != "head.weight"])
    assert shares.min() > 0.43
    assert shares.max() < 0.57
    bound = 1 / math.sqrt(thin.stages[0].conv1.weight[0].numel())
    assert float(thin.stages[0].conv1.weight.detach().abs().max()) == pytest.approx(bound, rel=0.05)


def test_the_rate_rises_and_falls_to_zero():
    factors = [factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert np.diff(factors[10:]).max() < 0
    assert factors[100] == 0


def test_every_pass_shows_every_image_once_in_an_order_of_the_seed():
    part = Part(torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6))
    one = torch.cat([targets for _, targets in batches_of(part, 2, 3, seed=1)])
    assert sorted(one.tolist()) == list(range(6))
    again = torch.cat([targets for _, targets in batches_of(part, 2, 3, seed=1)])
    other = torch.cat([targets for _, targets in batches_of(part, 2, 3, seed=2)])
    assert one.tolist() == again.tolist() != other.tolist()


def test_fit_trains_and_ends_at_rate_zero():
    torch.manual_seed(0)
    part = Part(torch.randn(32, 1, 4, 4), torch.arange(32) % 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    before = net[1].weight.clone()
    fit(net, part, steps=4, batch=8, rate=1e-2, seed=0)
    assert (net[1].weight - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", TASKS)
def test_a_dense_network_is_trained_once_and_read_again(name: str, tmp_path: Path):
    task = make_task(name, "small")
    net = dense(task, 1, tmp_path)
    (path,) = tmp_path.glob("*.pt")
    written = path.stat().st_mtime_ns
    again = dense(task, 1, tmp_path)
    assert path.stat().st_mtime_ns == written
    pairs = zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert 0 < score(net, task, task.data.val).value < 1


class Fixed(nn.Module):
    """Predicts the class that each image or pixel says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(x[:, 0].long(), 3).movedim(-1, 1).float()


def test_the_score_of_masks_is_the_mean_iou():
    task = make_task("brain", "small")
    target = torch.tensor([[[0, 0], [1, 1]]])
    predicted = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    result = score(Fixed(), task, Part(predicted, target))
    assert result.classes == pytest.approx([1 / 2, 2 / 3, 0], abs=1e-4)
    assert result.value == pytest.approx((1 / 2 + 2 / 3) / 3, abs=1e-4)
