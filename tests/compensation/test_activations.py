"""Layers are fitted to the range in which the activation behind them gives what it gives in the dense network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.compensation import collect_targets
from lightning_prune.compensation import fit as fitting
from lightning_prune.compensation.activations import ActivationWatch
from lightning_prune.compensation.fit import CallRows, fit
from lightning_prune.compensation.target_records import SampledRows
from lightning_prune.testing import randomise_
from tests.support.nets import Net
from tests.support.repairs import IMAGES, repaired


def watched(run, norm: nn.Module | None = None) -> tuple[float, float] | None:
    """Return the interval of the activation that is found behind a layer's output."""
    norm = norm or nn.BatchNorm2d(3).eval()
    watch: ActivationWatch[str] = ActivationWatch()
    with torch.no_grad(), watch.watching(norm):
        y = F.conv2d(torch.ones(2, 3, 4, 4), torch.ones(3, 3, 1, 1))
        watch.expect(y, "layer")
        run(y, norm)
    (chain,) = watch.chains
    return None if chain.is_broken else chain.interval


@pytest.mark.parametrize(
    ("run", "interval"),
    [
        (lambda y, norm: y.relu(), (0, math.inf)),
        (lambda y, norm: F.relu(y, inplace=True) + y, (0, math.inf)),
        (lambda y, norm: nn.ReLU()(norm(y)), (0, math.inf)),
        (lambda y, norm: F.relu(norm(y) + torch.ones(2, 3, 4, 4)), (0, math.inf)),
        (lambda y, norm: nn.ReLU6()(y), (0, 6)),
        (lambda y, norm: F.hardtanh(y), (-1, 1)),
        (lambda y, norm: F.hardtanh(y, -2, max_val=3), (-2, 3)),
        (lambda y, norm: nn.Hardswish()(y), (-3, math.inf)),
    ],
)
def test_activations_are_found(run, interval):
    assert watched(run) == interval


@pytest.mark.parametrize(
    "run",
    [
        lambda y, norm: F.gelu(y),
        lambda y, norm: y.sum() + y.relu().sum(),
        lambda y, norm: y.relu() + y,
        lambda y, norm: norm(y).relu() + y,
        lambda y, norm: [y.relu(), norm(y)],
        lambda y, norm: (z := y + 1, z.relu(), z.exp()),
        lambda y, norm: (z := norm(y) + torch.ones(2, 3, 4, 4), z.relu() + z),
        lambda y, norm: torch.cat([y, y]).relu(),
    ],
)
def test_activations_that_are_not_the_only_readers_are_not_used(run):
    assert watched(run) is None


def test_values_that_an_activation_does_not_tell_apart_cost_nothing(monkeypatch):
    """The line through the first point meets the second one at -2, which a rectifier does not tell from its -3."""
    x, target = torch.tensor([[[1.0], [-2.0]]]).double(), torch.tensor([[[1.0], [-3.0]]]).double()
    slack = torch.tensor([[[0.0], [3.0]]]).double()
    monkeypatch.setattr(fitting, "_STEPS", 60)
    plain = fit([CallRows(None, x, target, x, target, 1.0)], [2e-4])
    one_sided = fit([CallRows(None, x, target, x, target, 1.0, slack, slack)], [2e-4])
    assert plain.change is not None
    assert one_sided.change is not None
    assert plain.change.item() == pytest.approx(1.4, abs=0.01)
    assert one_sided.change.item() == pytest.approx(1, abs=0.01)
    assert one_sided.after < 1e-4 < 0.1 < plain.after


def test_slack_follows_the_sign_of_the_norm():
    rows = SampledRows(
        (torch.arange(3),), torch.tensor([[-1.0, 4.0, -5.0], [2.0, 1.0, 1.0], [9.0, -9.0, 9.0]])
    )
    lower, upper = torch.tensor([0.0, 3.0, 0.0]), torch.tensor([6.0, -3.0, 0.0])
    slack = rows.with_slack(lower, upper, torch.tensor([1.0, -1.0, 0.0])).slack
    assert slack is not None
    assert slack.tolist() == [[1, -1, 0], [0, 0, 0], [-3, 6, 0]]


def test_what_has_slack_agrees_behind_the_activation():
    """Targets and what their slack allows are the same behind norm and activation."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(F.relu6(net.norm(net.conv(x))))

    parts = {"conv": nn.Conv2d(3, 5, 1), "norm": nn.BatchNorm2d(5), "head": nn.Conv2d(5, 2, 1)}
    model = randomise_(Net(run, **parts)).eval()
    with torch.no_grad():
        model.norm.weight[:2] *= -4
        model.norm.weight[2:] *= 4
    rows = collect_targets(model, {}, [IMAGES]).calls["conv"][0].fit
    assert rows.slack is not None
    assert rows.slack.sign().unique().tolist() == [-1, 0, 1]
    behind = [F.relu6(model.norm(x[:, :, None, None])) for x in (rows.rows, rows.rows + rows.slack)]
    torch.testing.assert_close(*behind, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_come_nearer_with_the_activations(seed):
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
    ]
    torch.manual_seed(seed)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    changes = [
        repaired(copy.deepcopy(model), IMAGES, 0.5, seed, activations=on).change_after for on in (True, False)
    ]
    assert changes[0] < changes[1]
