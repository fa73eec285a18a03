"""Nothing gets worse, and nothing else is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.compensation import (
    collect_targets,
    compensate_,
    layer_repair,
)
from lightning_prune.compensation.fit import Fit
from lightning_prune.testing import randomise_
from tests.support.nets import Small, assert_same, random_units, state
from tests.support.repairs import IMAGES, NETWORKS, repaired


def test_the_held_out_images_decide(monkeypatch):
    """A change that seems good for a layer, but is bad for the network, is undone to the bit."""

    def harmful(calls, dampings):
        width = calls[0].x.shape[2], calls[0].residual.shape[2]
        change = torch.full((len(calls[0].x), *width), 9.0)
        constants = {call.slot: torch.ones(len(change) * width[1]) for call in calls if call.slot is not None}
        return Fit(1.0, 0.5, 0.1, change, constants)

    model = randomise_(Small())
    graph = trace(model, IMAGES[:2])
    targets = collect_targets(model, {}, [IMAGES])
    prune_(model, graph, graph.layers["inner.weight"][:3])
    before = state(model)
    monkeypatch.setattr(layer_repair, "fit", harmful)
    report = compensate_(model, targets, [IMAGES])
    assert not report.accepted
    assert report.change_after > report.change_before
    assert_same(state(model), before)
    assert str(report).startswith("not repaired: the outputs of held-out images did not come nearer")


def test_a_fit_to_other_images_is_refused():
    """What fits the first images is wrong for the last ones, which are of another kind."""
    images = IMAGES.clone()
    images[18:] = 100 * images[18:].abs().flip(2)
    images[:18] *= 1e-3
    model = randomise_(Small()).eval()
    dense = copy.deepcopy(model)
    cut = copy.deepcopy(model)
    graph = trace(cut, IMAGES[:2])
    prune_(cut, graph, random_units(graph, 0, 0.4))
    report = repaired(model, images)
    distances = [(dense(images[18:]) - net(images[18:])).square().sum() for net in (cut, model)]
    assert distances[1] <= distances[0]
    assert all(layer.after <= layer.before for layer in report.layers.values())


def test_without_a_cut_nothing_changes():
    model = randomise_(Small())
    before = state(model)
    report = compensate_(model, collect_targets(model, {}, [IMAGES]), [IMAGES])
    assert not report.accepted
    assert report.reason == "its outputs are the dense ones"
    assert_same(state(model), before)


@pytest.mark.parametrize("name", ["small", "siamese", "encoder"])
def test_a_repeat_gives_the_same_bits(name):
    build, inputs = NETWORKS[name]
    models = [build()]
    models.append(copy.deepcopy(models[0]))
    reports = []
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        reports.append(repaired(model, inputs))
    assert reports[0] == reports[1]
    for first, second in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_modes_random_numbers_gradients_and_buffers_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda module, args, output: module.calls.add_(1) and None)
    model[2].eval()
    random_state, running_mean = torch.get_rng_state(), model[1].running_mean[4:].clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = repaired(model, IMAGES, remove=("0.weight", slice(0, 4)))
    assert report.accepted
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not model[2].training
    assert model.calls <= 2  # of the trace
    assert torch.equal(model[1].running_mean, running_mean)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
