"""Targets that several cuts of the same network share."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune import trace
from lightning_prune.compensation import Targets, collect_targets, compensate_
from lightning_prune.compensation.sharing import narrowed_targets
from lightning_prune.surgery.prune import prune_, surviving_indices
from lightning_prune.testing import randomise_
from tests.support.nets import assert_same, random_units, state
from tests.support.repairs import NETWORKS


def plain(value: Any) -> Any:
    """Return targets as dictionaries and lists of tensors and plain values."""
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", NETWORKS)
def test_targets_of_all_filters_narrowed_to_a_cut_are_those_that_are_collected_for_it(name: str):
    build, inputs = NETWORKS[name]
    model = randomise_(build())
    graph = trace(model, inputs[:2])
    shared = collect_targets(model, {}, [inputs])
    before = copy.deepcopy(plain(shared))
    for seed in range(3):
        remove = random_units(graph, seed, 0.4)
        kept = surviving_indices(graph, graph.kept(remove))
        own, narrow = collect_targets(model, kept, [inputs]), narrowed_targets(shared, model, kept)
        assert_same(plain(narrow), plain(own))
        assert_same(plain(shared), before)


def test_a_repair_with_shared_targets_gives_the_same_bits():
    def repaired(targets: Targets, inputs: Tensor) -> Any:
        smaller = copy.deepcopy(model)
        prune_(smaller, trace(smaller, inputs[:2]), remove)
        report = compensate_(smaller, targets, [inputs])
        assert report.accepted
        return state(smaller)["values"]

    build, inputs = NETWORKS["small"]
    torch.manual_seed(0)
    model = randomise_(build())
    graph = trace(model, inputs[:2])
    remove = random_units(graph, 0, 0.4)
    kept = surviving_indices(graph, graph.kept(remove))
    shared = narrowed_targets(collect_targets(model, {}, [inputs]), model, kept, torch.device("cpu"))
    assert_same(repaired(shared, inputs), repaired(collect_targets(model, kept, [inputs]), inputs))
