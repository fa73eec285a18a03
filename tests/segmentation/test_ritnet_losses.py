"""RITnet's losses, compared with loops over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.data import signed_distances
from lightning_prune.segmentation.ritnet_losses import (
    EdgeWeightedCrossEntropy,
    GeneralisedDice,
    SurfaceLoss,
    edge_weights,
)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target() -> Tensor:
    target = torch.zeros(2, 6, 7, dtype=torch.int64)
    target[0, 2:5, 1:4], target[1, :, 5:] = 1, 2
    return target


def pixels(target: Tensor) -> list[tuple[int, int, int]]:
    n, h, w = target.shape
    return [(i, y, x) for i in range(n) for y in range(h) for x in range(w)]


def test_ignored_pixels_form_no_edge(target):
    assert edge_weights(target, radius=1)[1].any()
    assert not edge_weights(target, radius=1, ignore_index=2)[1].any()


@pytest.mark.parametrize("radius", [1, 2])
def test_edges_are_where_another_class_is_near(target, radius):
    weights = edge_weights(target, 20.0, radius)
    for i, y, x in pixels(target):
        around = target[i, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        assert weights[i, y, x] == (20.0 if len(around.unique()) > 1 else 0.0)


@pytest.mark.parametrize("ignored", [None, 2])
def test_defect_7_edge_weights_weight_each_pixel_before_the_mean(logits, target, ignored):
    """The published code multiplies the weights with an average, so that they have no effect."""
    weights, terms = edge_weights(target, 20.0, 1, ignored), []
    for i, y, x in pixels(target):
        if target[i, y, x] != ignored:
            probability = logits[i, :, y, x].softmax(0)[target[i, y, x]].item()
            terms.append((1 + weights[i, y, x].item()) * -math.log(probability))
    loss = EdgeWeightedCrossEntropy(radius=1, ignore_index=ignored)(logits, target)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_an_error_at_an_edge_costs_more_than_one_inside(target):
    right = 10.0 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    inside, edge = right.clone(), right.clone()
    inside[1, :, 0, 0], edge[1, :, 0, 5] = torch.tensor([0.0, 10.0, 0.0]), torch.tensor([0.0, 10.0, 0.0])
    loss = EdgeWeightedCrossEntropy(radius=1)
    assert loss(edge, target) - loss(right, target) > 20 * (loss(inside, target) - loss(right, target))


@pytest.mark.parametrize("ignored", [None, 2])
def test_generalised_dice_equals_its_formula_for_each_image(logits, target, ignored):
    probability, losses = logits.softmax(1), []
    for i in range(2):
        common = both = 0.0
        valid = [(y, x) for j, y, x in pixels(target) if j == i and target[i, y, x] != ignored]
        for c in range(3):
            truth = [float(target[i, y, x] == c) for y, x in valid]
            predicted = [probability[i, c, y, x].item() for y, x in valid]
            v = 1 / max(sum(truth) ** 2, 1e-5)
            common += v * sum(p * g for p, g in zip(predicted, truth, strict=True))
            both += v * (sum(predicted) + sum(truth))
        losses.append(1 - 2 * common / both)
    loss = GeneralisedDice(ignore_index=ignored)(logits, target)
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_generalised_dice_equals_monai():
    """In images with every class; implementations differ in the weight of an absent class."""
    from monai.losses import GeneralizedDiceLoss

    logits = torch.randn(3, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    target = torch.randint(0, 3, (3, 6, 7), generator=torch.Generator().manual_seed(2))
    theirs = GeneralizedDiceLoss(softmax=True, to_onehot_y=True, smooth_nr=0, smooth_dr=0)
    assert GeneralisedDice()(logits, target).item() == pytest.approx(
        theirs(logits, target[:, None]).item(), rel=1e-5
    )


def test_signed_distances_equal_the_distance_to_the_nearest_pixel_on_the_other_side(target):
    """Outside: to the nearest pixel of the class. Inside: to its own nearest pixel that touches another class."""
    target = torch.cat([target, torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(0))])
    for mask in target:
        distances, positions = signed_distances(mask, 4), [(y, x) for y in range(6) for x in range(7)]
        for c in range(4):
            inside = [p for p in positions if mask[p] == c]
            outside = [p for p in positions if mask[p] != c]
            for p in positions:
                if not inside or not outside:
                    expected = 0.0
                elif mask[p] == c:
                    expected = 1 - min(math.dist(p, q) for q in outside)
                else:
                    expected = min(math.dist(p, q) for q in inside)
                assert distances[c][p].item() == pytest.approx(expected / math.hypot(6, 7), abs=1e-6)


def test_ignored_pixels_are_outside_all_classes():
    distances = signed_distances(torch.tensor([[0, 0, 255, 1, 1]]), 2) * math.hypot(1, 5)
    assert distances[:, 0].round(decimals=4).tolist() == [[-1, 0, 1, 2, 3], [3, 2, 1, 0, -1]]


@pytest.mark.parametrize("ignored", [None, 2])
def test_surface_loss_equals_its_formula_for_each_pixel(logits, target, ignored):
    distances = torch.stack([signed_distances(mask, 3) for mask in target])
    probability, terms = logits.softmax(1), []
    for i, y, x in pixels(target):
        if target[i, y, x] != ignored:
            terms += [probability[i, c, y, x].item() * distances[i, c, y, x].item() for c in range(3)]
    loss = SurfaceLoss(ignore_index=ignored)(logits, target, distances)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_the_cost_of_a_wrong_pixel_grows_with_its_distance(target):
    distances = torch.stack([signed_distances(mask, 3) for mask in target])
    right = 50.0 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    costs = []
    for column in (4, 2, 0):  # class 2 begins in column 5 of the second image
        wrong = right.clone()
        wrong[1, :, 0, column] = torch.tensor([0.0, 0.0, 50.0])
        costs.append(SurfaceLoss()(wrong, target, distances).item())
    assert SurfaceLoss()(right, target, distances) < costs[0] < costs[1] < costs[2]


def test_without_distances_the_error_names_the_option(logits, target):
    with pytest.raises(ValueError, match=r"third entry of the batch, which has none: set distance_maps=true"):
        SurfaceLoss()(logits, target)
    with pytest.raises(ValueError, match=r"\(2, 3, 6, 7\) .* has a tensor of shape \(2, 6, 7\)"):
        SurfaceLoss()(logits, target, torch.zeros(2, 6, 7))
