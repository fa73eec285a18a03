"""What a removed channel still said is folded into what follows, and what cannot be is reported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.robustness.kill_run import same
from lightning_prune import prune_, trace
from lightning_prune.slimming.bias_folding import Folded, MeasuredShifts, outputs, relative_change
from lightning_prune.slimming.penalty import slimmable
from tests.support.slimming_runs import QUIET, faded, scaled

pytestmark = QUIET


def cut_and_fold(net: nn.Module, example: Tensor, silent: float = 0.0) -> tuple[Folded, float, float]:
    """What was folded, and how much the outputs changed with folding and without."""
    graph, scales, plan = faded(net, example, threshold=silent)
    remove = plan.remove
    measured = MeasuredShifts([net], graph, scales, remove, ((example,), {}))
    dropped = copy.deepcopy(net)
    prune_(dropped, trace(dropped, example), remove)
    prune_(net, graph, remove)
    assert len(remove)
    unfolded = relative_change(measured.before, outputs(dropped, ((example,), {})))
    return measured.fold_(remove), measured.change(), unfolded


def exact_nets() -> dict[str, nn.Module]:
    def after(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), *layers)

    return {
        "one element": after(nn.Conv2d(8, 3, 1)),
        "no padding": after(nn.Conv2d(8, 3, 3)),
        "reflected": after(nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")),
        "into the running mean": after(nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3)),
        "flattened": after(nn.Flatten(), nn.Linear(8 * 64, 3)),
        "transposed": after(nn.ConvTranspose2d(8, 3, 2, stride=1), nn.AdaptiveAvgPool2d(1)),
        "depthwise between": after(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 3, 1, bias=False),
            nn.BatchNorm2d(3),
        ),
    }


@pytest.mark.parametrize("name", exact_nets())
def test_a_removed_shift_is_folded_exactly(name: str) -> None:
    net = scaled(exact_nets()[name], 0.0)
    folded, change, unfolded = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert unfolded > 1e-2  # what dropping it does
    if name == "transposed":  # its border sees fewer elements
        assert folded == Folded(approximate=1)
    else:
        assert change < 1e-5
        assert folded == Folded(exact=1)


def test_behind_zero_padding_the_mean_is_folded_and_the_rest_reported() -> None:
    net = scaled(nn.Sequential(*exact_nets()["one element"][:3], nn.Conv2d(8, 3, 3, padding=1)), 0.0)
    folded, change, unfolded = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert folded == Folded(approximate=1)
    assert 1e-4 < change < unfolded


def test_without_bias_and_norm_nothing_takes_the_shift() -> None:
    net = scaled(nn.Sequential(*exact_nets()["one element"][:3], nn.Conv2d(8, 3, 1, bias=False)), 0.0)
    folded, change, unfolded = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert folded == Folded(lost=1)
    assert change == unfolded > 1e-2


def test_measuring_leaves_the_network_as_it_was() -> None:
    net = scaled(exact_nets()["depthwise between"], 1e-4)
    before = copy.deepcopy(net.state_dict())
    example = torch.randn(2, 1, 8, 8)
    graph = trace(net, example)
    scales = slimmable(graph, net)
    MeasuredShifts([net], graph, scales, graph.layers["0.weight"][:3], ((example,), {}))
    assert same(net.state_dict(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
