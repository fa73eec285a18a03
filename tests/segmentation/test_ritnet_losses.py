"""RITnet's losses, against sums over pixels written as loops."""

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


def test_ignored_pixels_make_no_edge(target):
    assert edge_weights(target, radius=1)[1].any()
    assert not edge_weights(target, radius=1, ignore_index=2)[1].any()


@pytest.mark.parametrize("radius", [1, 2])
def test_edges_are_where_another_class_is_near(target, radius):
    found = edge_weights(target, 20.0, radius)
    for i, y, x in pixels(target):
        around = target[i, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        assert found[i, y, x] == (20.0 if len(around.unique()) > 1 else 0.0)


@pytest.mark.parametrize("ignored", [None, 2])
def test_defect_7_edge_weights_weight_each_pixel_before_the_mean(logits, target, ignored):
    """In the published code they multiplied an average, so that they weighted nothing."""
    weights, terms = edge_weights(target, 20.0, 1, ignored), []
    for i, y, x in pixels(target):
        if target[i, y, x] != ignored:
            chance = logits[i, :, y, x].softmax(0)[target[i, y, x]].item()
            terms.append((1 + weights[i, y, x].item()) * -math.log(chance))
    found = EdgeWeightedCrossEntropy(radius=1, ignore_index=ignored)(logits, target)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_an_error_at_an_edge_costs_more_than_one_inside(target):
    right = 10.0 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    inside, edge = right.clone(), right.clone()
    inside[1, :, 0, 0], edge[1, :, 0, 5] = torch.tensor([0.0, 10.0, 0.0]), torch.tensor([0.0, 10.0, 0.0])
    loss = EdgeWeightedCrossEntropy(radius=1)
    assert loss(edge, target) - loss(right, target) > 20 * (loss(inside, target) - loss(right, target))


@pytest.mark.parametrize("ignored", [None, 2])
def test_generalised_dice_is_its_formula_image_by_image(logits, target, ignored):
    chance, each = logits.softmax(1), []
    for i in range(2):
        common = both = 0.0
        seen = [(y, x) for j, y, x in pixels(target) if j == i and target[i, y, x] != ignored]
        for c in range(3):
            truth = [float(target[i, y, x] == c) for y, x in seen]
            found = [chance[i, c, y, x].item() for y, x in seen]
            v = 1 / max(sum(truth) ** 2, 1e-5)
            common += v * sum(p * g for p, g in zip(found, truth, strict=True))
            both += v * (sum(found) + sum(truth))
        each.append(1 - 2 * common / both)
    loss = GeneralisedDice(ignore_index=ignored)(logits, target)
    assert loss.item() == pytest.approx(sum(each) / 2, rel=1e-4)


def test_generalised_dice_is_monai_s():
    """Where every class occurs: what an absent one weighs is each implementation's own."""
    from monai.losses import GeneralizedDiceLoss

    logits = torch.randn(3, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    target = torch.randint(0, 3, (3, 6, 7), generator=torch.Generator().manual_seed(2))
    theirs = GeneralizedDiceLoss(softmax=True, to_onehot_y=True, smooth_nr=0, smooth_dr=0)
    assert GeneralisedDice()(logits, target).item() == pytest.approx(
        theirs(logits, target[:, None]).item(), rel=1e-5
    )


def test_signed_distances_are_those_to_the_nearest_pixel_of_the_other_kind(target):
    """Outside: to the nearest pixel of the class. Inside: to its own nearest pixel that touches another class."""
    target = torch.cat([target, torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(0))])
    for mask in target:
        found, where = signed_distances(mask, 4), [(y, x) for y in range(6) for x in range(7)]
        for c in range(4):
            own = [p for p in where if mask[p] == c]
            rest = [p for p in where if mask[p] != c]
            for p in where:
                if not own or not rest:
                    expected = 0.0
                elif mask[p] == c:
                    expected = 1 - min(math.dist(p, q) for q in rest)
                else:
                    expected = min(math.dist(p, q) for q in own)
                assert found[c][p].item() == pytest.approx(expected / math.hypot(6, 7), abs=1e-6)


def test_ignored_pixels_lie_outside_of_all_classes():
    found = signed_distances(torch.tensor([[0, 0, 255, 1, 1]]), 2) * math.hypot(1, 5)
    assert found[:, 0].round(decimals=4).tolist() == [[-1, 0, 1, 2, 3], [3, 2, 1, 0, -1]]


@pytest.mark.parametrize("ignored", [None, 2])
def test_surface_loss_is_its_formula_pixel_by_pixel(logits, target, ignored):
    distances = torch.stack([signed_distances(mask, 3) for mask in target])
    chance, terms = logits.softmax(1), []
    for i, y, x in pixels(target):
        if target[i, y, x] != ignored:
            terms += [chance[i, c, y, x].item() * distances[i, c, y, x].item() for c in range(3)]
    found = SurfaceLoss(ignore_index=ignored)(logits, target, distances)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_a_wrong_pixel_costs_more_the_further_off_it_is(target):
    distances = torch.stack([signed_distances(mask, 3) for mask in target])
    right = 50.0 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    costs = []
    for column in (4, 2, 0):  # class 2 begins in column 5 of the second image
        wrong = right.clone()
        wrong[1, :, 0, column] = torch.tensor([0.0, 0.0, 50.0])
        costs.append(SurfaceLoss()(wrong, target, distances).item())
    assert SurfaceLoss()(right, target, distances) < costs[0] < costs[1] < costs[2]


def test_without_distances_the_error_says_which_option_makes_them(logits, target):
    with pytest.raises(ValueError, match=r"third entry of the batch, which has none: set distance_maps=true"):
        SurfaceLoss()(logits, target)
    with pytest.raises(ValueError, match=r"\(2, 3, 6, 7\) .* has a tensor of shape \(2, 6, 7\)"):
        SurfaceLoss()(logits, target, torch.zeros(2, 6, 7))
