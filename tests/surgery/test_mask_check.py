"""What is said of the commonest operators without arithmetic never contradicts the arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from timm.layers import ScaledStdConv2d
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.surgery import numerical_check as replay
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.tracker import TracedOperator
from tests.support.nets import Small
from tests.support.random_cuts import random_units

Pairs = tuple[list[tuple[TracedOperator, TracedOperator]], replay._Survival]

NETWORKS = {
    "small": lambda: (Small(), 16),
    "shufflenet": lambda: (tv.shufflenet_v2_x0_5(weights=None), 32),
    "mobilenet": lambda: (tv.mobilenet_v3_small(weights=None), 32),
    "regnet": lambda: (tv.regnet_y_400mf(weights=None), 32),
    "vit": lambda: (timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32), 32),
}


def pairs(monkeypatch: pytest.MonkeyPatch, model: nn.Module, size: int) -> Pairs:
    """The operators before and after a random cut, and what survives of it."""
    seen: list[tuple[list[TracedOperator], list[TracedOperator], np.ndarray]] = []
    original = replay.mismatches

    def watch(
        dense: list[TracedOperator], small: list[TracedOperator], alive: np.ndarray
    ) -> Iterator[tuple[TracedOperator, str]]:
        seen.append((dense, small, alive))
        yield from original(dense, small, alive)

    monkeypatch.setattr("lightning_prune.surgery.proof.mismatches", watch)
    graph = trace(model, torch.zeros(2, 3, size, size))
    prune_(model, graph, random_units(graph, np.random.default_rng(0), 0.4, graph.prunable))
    dense, small, alive = seen[0]
    return list(replay._pairs(dense, small)), replay._Survival(alive)


def wrong(followed: TracedOperator, generator: np.random.Generator) -> TracedOperator:
    """The same operator with one of its labels in another order, or gone."""
    labels = copy.copy(followed.labels)
    places = [(i, d) for i, dims in enumerate(labels) for d, arrays in enumerate(dims) if arrays]
    if not places:
        return followed
    at, dim = places[generator.integers(len(places))]
    other: tuple[Ids, ...] = ()
    if generator.random() < 0.8:
        ids = labels[at][dim][0]
        other = (ids[torch.from_numpy(generator.permutation(len(ids)))],)
    labels[at] = tuple(other if d == dim else arrays for d, arrays in enumerate(labels[at]))
    return replace(followed, labels=labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_and_numbers_agree_under_wrong_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found, survival = pairs(monkeypatch, *NETWORKS[name]())
    generator, caught = np.random.default_rng(1), 0
    for before, after in found:
        if not survival.touches(before) or not replay._telling(before.call) or before.mixed:
            continue
        for attempt in range(3):
            tried = wrong(before, generator) if attempt else before
            count = len(tried.shapes)
            masks = survival.masks(tried.labels[:count]), survival.masks(tried.labels[count:])
            shapes = zip(tried.shapes, after.shapes, tried.labels, strict=False)
            misfit = any(replay._misfit(*each, survival) for each in shapes)
            said = replay.fits(tried, after, *masks)
            if misfit:
                continue
            numbers = replay._by_numbers(tried, after, survival)
            assert not (said and numbers), f"{before.call}: {numbers}"
            caught += bool(numbers)
    assert caught, "no wrong label was wrong"


def test_most_operators_of_common_networks_need_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the proof is slow again: numbers are the exception."""
    asked: list[str] = []
    monkeypatch.setattr(replay, "_by_numbers", lambda before, *rest: asked.append(str(before.call)))
    for name in ("small", "mobilenet", "regnet", "vit"):
        torch.manual_seed(0)
        found, _ = pairs(monkeypatch, *NETWORKS[name]())
        assert len(asked) <= len(found) // 20, asked
        asked.clear()


def test_a_norm_of_weights_may_lose_inputs_as_well_as_filters() -> None:
    """timm's nf_resnet26: a batch norm standardises a weight; its gain runs along the filters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), ScaledStdConv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    prune_(model, graph, [*graph.layers["0.weight"][:3], *graph.layers["2.weight"][1:4]])
    assert model[2].weight.shape == (3, 5, 1, 1)
