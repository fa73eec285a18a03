"""One shot without a trainer: budget, repair, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Limits, PruningPolicy, one_shot, trace
from lightning_prune.criteria import L2, LAMP, Random, TaylorGate

EXAMPLE = torch.zeros(1, 1, 12, 12)


def images(number: int = 64, seed: int = 0) -> Tensor:
    noise = torch.randn(number, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 3, 1, 1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 2, 3),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(50):
            network(images(seed=7))
    return network.eval()


def distance(dense: nn.Module, small: nn.Module) -> float:
    """Relative distance of the outputs on images that no fit has used."""
    x = images(seed=1)
    with torch.no_grad():
        before, after = dense(x), small(x)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("criterion", [L2(), LAMP(), Random(1)])
def test_a_repaired_network_is_nearer_to_the_dense_one(net, criterion):
    small = {flag: copy.deepcopy(net) for flag in (False, True)}
    records = {
        flag: one_shot(each, EXAMPLE, {"macs": 0.5}, criterion, [images()], compensate=flag)
        for flag, each in small.items()
    }
    assert records[True] == records[False]
    graph = trace(small[True], EXAMPLE)
    assert graph.cost("macs") <= 0.5 * trace(net, EXAMPLE).cost("macs")
    assert distance(net, small[True]) < 0.7 * distance(net, small[False])


def test_a_policy_in_place_of_the_budget(net):
    policy = PruningPolicy({"macs": 0.6}, limits=Limits(0.9), exclude=["0"], channel_multiple=4)
    one_shot(net, EXAMPLE, policy)
    assert (net[0].out_channels, net[3].out_channels % 4) == (16, 0)


def test_a_repair_without_batches_is_refused_and_changes_nothing(net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="compensate needs batches"):
        one_shot(net, EXAMPLE, {"macs": 0.5}, compensate=True)
    with pytest.raises(ValueError, match="at least two images"):
        one_shot(net, EXAMPLE, {"macs": 0.5}, batches=[images(1)], compensate=True)
    with pytest.raises(ValueError, match="pass loss="):
        one_shot(net, EXAMPLE, {"macs": 0.5}, TaylorGate(), [images()])
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_the_warning_that_nothing_was_repaired_is_at_the_call_of_one_shot(net):
    nn.init.zeros_(net[6].weight)
    with pytest.warns(
        UserWarning, match="the cut was not repaired: its outputs are the dense ones"
    ) as warned:
        one_shot(net, EXAMPLE, {"macs": 0.5}, L2(), [images()])
    assert [warning.filename for warning in warned] == [__file__]
