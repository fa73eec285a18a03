"""Tests that the constant output of removed channels is folded into the next layer, or reported as lost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.robustness.kill_run import same
from lightning_prune import prune_, trace
from lightning_prune.slimming.bias_folding import Folded, MeasuredShifts, outputs, relative_change
from lightning_prune.slimming.penalty import slimmable
from tests.support.slimming_runs import QUIET, plan_small_scales, set_small_scales

pytestmark = QUIET


def cut_and_fold(net: nn.Module, example: Tensor, threshold: float = 0.0) -> tuple[Folded, float, float]:
    """Return what was folded, and the relative change of the outputs with folding and without."""
    graph, scales, plan = plan_small_scales(net, example, threshold=threshold)
    remove = plan.remove
    measured = MeasuredShifts([net], graph, scales, remove, ((example,), {}))
    unfolded_net = copy.deepcopy(net)
    prune_(unfolded_net, trace(unfolded_net, example), remove)
    prune_(net, graph, remove)
    assert len(remove)
    change_without_folding = relative_change(measured.before, outputs(unfolded_net, ((example,), {})))
    return measured.fold_(remove), measured.changes()[0], change_without_folding


def networks() -> dict[str, nn.Module]:
    """Return networks by the layer that reads the removed channels."""

    def with_stem(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), *layers)

    return {
        "one element": with_stem(nn.Conv2d(8, 3, 1)),
        "no padding": with_stem(nn.Conv2d(8, 3, 3)),
        "reflected": with_stem(nn.Conv2d(8, 3, 3, padding=1, padding_mode="reflect")),
        "into the running mean": with_stem(nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3)),
        "flattened": with_stem(nn.Flatten(), nn.Linear(8 * 64, 3)),
        "transposed": with_stem(nn.ConvTranspose2d(8, 3, 2, stride=1), nn.AdaptiveAvgPool2d(1)),
        "depthwise between": with_stem(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 3, 1, bias=False),
            nn.BatchNorm2d(3),
        ),
    }


@pytest.mark.parametrize("name", networks())
def test_a_removed_shift_is_folded_exactly(name: str) -> None:
    net = set_small_scales(networks()[name], 0.0)
    folded, change, change_without_folding = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert change_without_folding > 1e-2  # the shift matters
    if name == "transposed":  # at its border fewer inputs contribute
        assert folded == Folded(approximate=1)
    else:
        assert change < 1e-5
        assert folded == Folded(exact=1)


def test_before_zero_padding_the_mean_is_folded_and_the_remaining_change_is_reported() -> None:
    net = set_small_scales(nn.Sequential(*networks()["one element"][:3], nn.Conv2d(8, 3, 3, padding=1)), 0.0)
    folded, change, change_without_folding = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert folded == Folded(approximate=1)
    assert 1e-4 < change < change_without_folding


def test_without_bias_and_norm_the_shift_is_lost() -> None:
    net = set_small_scales(nn.Sequential(*networks()["one element"][:3], nn.Conv2d(8, 3, 1, bias=False)), 0.0)
    folded, change, change_without_folding = cut_and_fold(net, torch.randn(4, 1, 8, 8))
    assert folded == Folded(lost=1)
    assert change == change_without_folding > 1e-2


def test_measuring_does_not_change_the_network() -> None:
    net = set_small_scales(networks()["depthwise between"], 1e-4)
    before = copy.deepcopy(net.state_dict())
    example = torch.randn(2, 1, 8, 8)
    graph = trace(net, example)
    scales = slimmable(graph, net)
    MeasuredShifts([net], graph, scales, graph.layers["0.weight"][:3], ((example,), {}))
    assert same(net.state_dict(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Chosen(nn.Module):
    """Returns the rows whose first number is positive, as a detector returns boxes."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0]


def test_outputs_whose_number_depends_on_values_are_not_compared() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), Chosen())
    set_small_scales(net, 1e-4)
    example = torch.randn(16, 2)
    graph = trace(net, example)
    remove = graph.layers["0.weight"][:3]
    measured = MeasuredShifts([net], graph, slimmable(graph, net), remove, ((example,), {}))
    assert len(measured.before[0])
    prune_(net, graph, remove)
    nn.init.constant_(net[3].bias, -100.0)
    assert all(map(math.isnan, measured.changes()))
