"""RITnet's losses, against sums over pixels written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.ritnet_losses import EdgeWeightedCrossEntropy, GeneralisedDice, edge_weights


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
