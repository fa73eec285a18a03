"""Layers that cannot be repaired are named, and bad input changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.compensation import (
    CompensationError,
    collect_targets,
    compensate_,
    cut_and_compensate_,
    layer_repair,
)
from lightning_prune.testing import randomise_
from tests.support.nets import Net, Small, assert_same, random_units, state
from tests.support.repairs import IMAGES, NETWORKS, TOKENS, repaired


def test_what_cannot_be_repaired_is_named():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    parts = {
        "stem": nn.Linear(12, 16),
        "frozen": nn.Linear(16, 16).requires_grad_(False),
        "own": Doubled(16, 16),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        "unused": nn.Linear(16, 16),
        "head": nn.Linear(16, 3),
    }

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(F.relu(net.normed(F.relu(net.own(F.relu(net.frozen(F.relu(net.stem(x)))))))))

    model = Net(run, **parts)
    frozen = model.frozen.weight.clone()
    report = repaired(model, TOKENS, remove=("stem.weight", slice(0, 5)))
    assert report.left_alone == {
        "frozen": "frozen",
        "own": "it has a forward of its own",
        "normed": "its weight or bias is computed",
        "unused": "it did not run",
    }
    assert report.layers.keys() == {"head"}
    assert torch.equal(model.frozen.weight, frozen[:, 5:])


def test_a_network_that_is_frozen_as_a_whole_is_repaired():
    report = repaired(Small().requires_grad_(False), IMAGES)
    assert report.accepted
    assert not report.left_alone


def test_a_weight_that_an_embedding_reads_is_left_alone():
    def run(net: nn.Module, tokens: Tensor) -> Tensor:
        return net.head(F.relu(net.mix(net.embedding(tokens))))

    model = Net(run, embedding=nn.Embedding(9, 8), mix=nn.Linear(8, 8), head=nn.Linear(8, 9, bias=False))
    model.head.weight = model.embedding.weight
    tokens = torch.randint(9, (16, 5), generator=torch.Generator().manual_seed(0))
    report = repaired(model, tokens, 0.3)
    assert report.left_alone == {"head": "a module of another kind reads its weight"}


def test_layers_too_large_are_named():
    report = repaired(Small(), IMAGES, max_elements=64 * 20, min_positions=64)
    assert "too large" in report.left_alone["inner"]
    assert "head" in report.layers


def test_layers_with_more_inputs_than_positions_are_repaired():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))
    report = repaired(model, IMAGES, remove=("0.weight", slice(0, 3)), max_elements=8 * 500)
    assert not report.left_alone
    assert report.layers["3"].after < report.layers["3"].before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = Small().to(dtype)
    report = repaired(model, IMAGES.to(dtype))
    assert report.accepted
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["small", "siamese", "encoder"])
def test_mixed_precision(name):
    build, inputs = NETWORKS[name]
    model = build()
    graph = trace(model, inputs[:2])
    full = copy.deepcopy(model)
    remove, dense = random_units(graph, 0, 0.4), copy.deepcopy(model)
    record = prune_(model, graph, remove)
    with torch.autocast("cpu", torch.bfloat16):
        report = compensate_(model, collect_targets(dense, record.kept, [inputs]), [inputs])
    expected = repaired(full, inputs)
    assert report.accepted
    assert report.change_after < 1.2 * expected.change_after + 1e-3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_single_position_does_not_make_it_singular():
    report = repaired(Small(), IMAGES, positions=1)
    assert report.change_after <= report.change_before or not report.accepted


def test_constant_images_do_not_make_it_singular():
    report = repaired(Small(), torch.ones(8, 3, 12, 12))
    assert all(layer.after <= layer.before for layer in report.layers.values())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "needs a batch"),
        ([{"label": "cat"}], "needs a batch"),
        ([IMAGES[:1]], "at least two images, got 1"),
        ([torch.where(IMAGES > 2, torch.nan, IMAGES)], "not finite"),
        ([IMAGES[:, :2]], "cannot run"),
        ([IMAGES, IMAGES[..., :5]], "images of sizes"),
    ],
)
def test_bad_images_change_nothing(batches, message):
    model = randomise_(Small())
    before = state(model)
    graph = trace(model, IMAGES[:2])
    with pytest.raises(CompensationError, match=message):
        cut_and_compensate_(model, graph, graph.layers["inner.weight"][:3], batches)
    assert_same(state(model), before)


def test_a_refused_cut_changes_nothing():
    model = Small()
    graph = trace(model, IMAGES[:2])
    before = state(model)
    with pytest.raises(SurgeryError, match="nothing would be left"):
        cut_and_compensate_(model, graph, graph.layers["inner.weight"], [IMAGES])
    assert_same(state(model), before)


def test_other_images_than_those_of_the_targets_are_refused():
    model = Small()
    targets = collect_targets(model, {}, [IMAGES])
    with pytest.raises(CompensationError, match="24 images, not 8"):
        compensate_(model, targets, [IMAGES[:8]])


def test_a_failure_in_the_middle_undoes_everything(monkeypatch):
    model = randomise_(Small())
    graph = trace(model, IMAGES[:2])
    targets = collect_targets(model, {}, [IMAGES])
    prune_(model, graph, graph.layers["inner.weight"][:3])
    before, original = state(model), layer_repair.fit
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(layer_repair, "fit", failing)
    with pytest.raises(KeyboardInterrupt):
        compensate_(model, targets, [IMAGES])
    assert_same(state(model), before)


def test_batches_with_labels_are_joined():
    model = Small()
    twin = copy.deepcopy(model)
    graph, graph_of_twin = trace(model, IMAGES[:2]), trace(twin, IMAGES[:2])
    remove = random_units(graph)
    _, report = cut_and_compensate_(model, graph, remove, [IMAGES])
    batches = [(IMAGES[:10], torch.zeros(10)), (IMAGES[10:], torch.zeros(14))]
    assert cut_and_compensate_(twin, graph_of_twin, remove, batches)[1] == report
