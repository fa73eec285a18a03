"""Layers are refined together by the network's outputs: nearer, or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import one_shot, trace
from lightning_prune.compensation import CompensationSettings, cut_and_compensate_, refinement
from lightning_prune.compensation.calibration import Calibration
from lightning_prune.compensation.im2col import ImageAxis
from lightning_prune.testing import randomise_
from tests.support.nets import Small, assert_same, state
from tests.support.repairs import NETWORKS, repaired

IMAGES = torch.randn(160, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def distance(dense: nn.Module, model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((dense.eval()(images) - model.eval()(images)).square().sum())


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_come_nearer_on_images_that_took_no_part(name):
    build, few = NETWORKS[name]
    torch.manual_seed(0)
    inputs = torch.randn(160, *few.shape[1:])
    dense = randomise_(build()).eval()
    plain, refined = copy.deepcopy(dense), copy.deepcopy(dense)
    repaired(plain, inputs, refit=False)
    report = repaired(refined, inputs, refit=False, refine_passes=30)
    assert report.not_refined == ""
    assert distance(dense, refined, inputs[120:]) < 0.95 * distance(dense, plain, inputs[120:])


def test_what_comes_no_nearer_is_undone_to_the_bit(monkeypatch):
    torch.manual_seed(0)
    plain = randomise_(Small())
    refined = copy.deepcopy(plain)
    repaired(plain, IMAGES)
    monkeypatch.setattr(refinement, "_RATE", 100.0)
    report = repaired(refined, IMAGES, refine_passes=2)
    assert report.accepted
    assert report.not_refined.startswith("the outputs came no nearer by it (change ")
    assert_same(refined.state_dict(), plain.state_dict())


class WithoutGradients(Small):
    """A network whose forward breaks the graph, as one for inference may do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class OfWholeBatches(Small):
    """A network that only runs on 160 images."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in (2, 160):
            raise RuntimeError("160 images, please")
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "words"), [(WithoutGradients, "does not require grad"), (OfWholeBatches, "160 images, please")]
)
def test_a_network_without_gradients_keeps_its_repair(build, words):
    torch.manual_seed(0)
    plain = build()
    refined = copy.deepcopy(plain)
    repaired(plain, IMAGES)
    report = repaired(refined, IMAGES, refine_passes=2)
    assert report.accepted
    assert words in report.not_refined
    assert words in str(report)
    assert_same(refined.state_dict(), plain.state_dict())


def test_frozen_layers_gradients_modes_and_random_numbers_stay():
    torch.manual_seed(0)
    plain = randomise_(Small()).train()
    plain.get_submodule("inner").requires_grad_(False)
    refined = copy.deepcopy(plain)
    for parameter in [*plain.parameters(), *refined.parameters()]:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    repaired(plain, IMAGES)
    random_state = torch.get_rng_state()
    report = repaired(refined, IMAGES, refine_passes=30)
    assert report.not_refined == ""
    assert report.left_alone["inner"] == "frozen"
    assert torch.equal(refined.inner.weight, plain.inner.weight)
    frozen = [name for name, parameter in refined.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"inner.{name}" for name, _ in refined.inner.named_parameters()]
    gradients = [[parameter.grad for parameter in net.parameters()] for net in (refined, plain)]
    assert_same(*gradients)  # surgery drops those of cut parameters
    assert torch.equal(torch.get_rng_state(), random_state)
    assert refined.training


def test_a_network_for_inference_is_refined_and_stays_frozen():
    torch.manual_seed(0)
    model = randomise_(Small()).eval().requires_grad_(False)
    report = repaired(model, IMAGES, refine_passes=30)
    assert report.not_refined == ""
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_that_are_too_small_for_half_precision_add_up():
    """Each step moves the weight by 2e-4 of its size; bfloat16 rounds to 4e-3."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    optimizer = refinement._Optimizer({"weight": weight}, {"weight": 2e-4}, 200)
    for _ in range(200):
        optimizer.step(weight.sum())
    assert weight.item() == pytest.approx(1 - 2e-4 * 100, abs=5e-3)


def test_the_loss_is_that_of_the_chosen_images():
    """By hand, for outputs that list three windows of each image: their images are found in the same order."""
    images = torch.arange(4.0)[:, None]
    dense = torch.arange(12.0)[:, None]
    model = nn.Module()
    model.forward = lambda x: (x * 3 + torch.arange(3.0)).reshape(-1, 1) + 2.0
    calibration = Calibration(((images,), {}), 4, 3)
    loss = refinement._loss(model, calibration, [dense], torch.tensor([2, 0]))
    assert float(loss) == pytest.approx(4.0 / float(dense.var(correction=0)))
    with pytest.raises(ValueError, match=r"an output is of shape \(2, 1\), not \(6, 1\)"):
        refinement._distance(torch.zeros(2, 1), dense, ImageAxis(0, 3), torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="sizes of its outputs depend on values"):
        refinement._loss(model, calibration, [], torch.tensor([2, 0]))


def test_a_list_of_images_is_refused_even_if_it_is_as_long_as_an_image_has_channels():
    calibration = Calibration((([torch.zeros(3, 8, 8)] * 3,), {}), 3, 2)
    with pytest.raises(ValueError, match="not every input has one entry for each image"):
        refinement._part(calibration, torch.tensor([0]))


def test_a_repeat_gives_the_same_bits():
    torch.manual_seed(0)
    models = [randomise_(Small())]
    models.append(copy.deepcopy(models[0]))
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        assert repaired(model, IMAGES, refine_passes=30).not_refined == ""
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_one_shot_takes_settings():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    by_hand, refined = copy.deepcopy(plain), copy.deepcopy(plain)
    settings = CompensationSettings(refine_passes=30)
    record = one_shot(refined, IMAGES[:1], {"macs": 0.5}, batches=[IMAGES], compensate=settings)
    graph = trace(by_hand, IMAGES[:1])
    removed = sorted(set(range(8)) - set(record.kept["0.weight"][0]))
    cut_and_compensate_(by_hand, graph, graph.layers["0.weight"][removed], [IMAGES], settings=settings)
    assert_same(refined.state_dict(), by_hand.state_dict())
    before = state(plain)
    with pytest.raises(ValueError, match="compensate must be True, False or CompensationSettings, got 15"):
        one_shot(plain, IMAGES[:1], {"macs": 0.5}, batches=[IMAGES], compensate=15)
    assert_same(state(plain), before)
    with pytest.raises(ValueError, match="refine_passes must not be negative, got -1"):
        CompensationSettings(refine_passes=-1)
