"""Branches are fitted to the sums that read them, so that they correct the residual stream."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.compensation import (
    collect_targets,
    compensate_,
)
from lightning_prune.testing import randomise_
from tests.support.nets import Net
from tests.support.repairs import IMAGES, repaired


def sum_targets(run, inputs: Tensor = IMAGES) -> set[str]:
    """Return the layers that are fitted to a sum."""
    parts = {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("first", "second")}
    targets = collect_targets(Net(run, **parts, norm=nn.BatchNorm2d(3)), {}, [inputs])
    return {name for name, (call,) in targets.calls.items() if call.sums is not None}


def test_branches_are_fitted_to_the_sum_that_reads_them():
    def in_place(net: nn.Module, x: Tensor) -> Tensor:
        y = net.norm(net.second(net.first(x).relu()))
        y += x
        return y

    assert sum_targets(lambda net, x: x + net.second(net.first(x).relu())) == {"second"}
    assert sum_targets(lambda net, x: torch.add(F.dropout(net.second(net.first(x)), training=False), x)) == {
        "second"
    }
    assert sum_targets(lambda net, x: net.first(x) + net.second(x)) == {"second"}
    assert sum_targets(in_place) == {"second"}


def test_outputs_that_something_else_reads_are_not_fitted_to_a_sum():
    def read_before(net: nn.Module, x: Tensor) -> Tensor:
        y = net.first(x)
        return y.sigmoid() + y

    def input_changes(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        y = net.first(x)
        return y + x.relu_()

    assert sum_targets(read_before) == set()
    assert sum_targets(lambda net, x: net.first(x) + x.mean()) == set()
    assert sum_targets(input_changes) == set()
    assert sum_targets(lambda net, x: net.first(x).relu() + x) == set()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("spelling", ["plus", "add_"])
def test_a_branch_corrects_the_residual_stream(normed, spelling):
    """The stream has lost a term that is linear in what the branch reads, so the branch can supply it."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        stream, branch = net.narrow(net.wide(x)), net.norm(net.branch(x))
        return branch + stream if spelling == "plus" else branch.add_(stream)

    parts = {"wide": nn.Conv2d(3, 8, 1), "narrow": nn.Conv2d(8, 4, 1), "branch": nn.Conv2d(3, 4, 1)}
    model = Net(run, **parts, norm=nn.BatchNorm2d(4) if normed else nn.Identity())
    model = randomise_(model).double()
    remove = "wide.weight", slice(1, 8)
    reports = [repaired(copy.deepcopy(model), IMAGES.double(), remove=remove, sums=x) for x in (False, True)]
    assert reports[0].change_after > 1e-2
    assert reports[1].change_after < 1e-5


def test_a_sum_that_does_not_come_again_is_named():
    def run(net: nn.Module, x: Tensor) -> Tensor:
        y = net.branch(net.wide(x))
        return y + x if len(net.wide.weight) == 8 else torch.stack([y, x]).sum(0)

    model = Net(run, wide=nn.Conv2d(3, 8, 1), branch=nn.Conv2d(8, 3, 1))
    targets = collect_targets(model, {"wide.weight": {0: [0, 1]}, "branch.weight": {1: [0, 1]}}, [IMAGES])
    model.wide, model.branch = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)
    report = compensate_(model, targets, [IMAGES])
    assert report.left_alone == {"branch": "the sum that reads it in the dense network did not come"}
