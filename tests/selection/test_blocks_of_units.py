"""Taking units in blocks gives the plans that taking them one by one gives."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from torch import nn

from lightning_prune import Limits, select, trace
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term, number_columns, number_equal, number_rows
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.unit_pool import UnitPool


def residual_graph(seed: int) -> ChannelGraph:
    torch.manual_seed(seed)
    widths = torch.randint(4, 24, (6,)).tolist()
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3)]
    for before, after in pairwise(widths):
        layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, after, 3, padding=1)]
    return trace(nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1)), torch.zeros(1, 3, 12, 12))


@pytest.mark.parametrize("seed", range(12))
def test_plans_are_those_of_one_unit_at_a_time(seed: int, monkeypatch: pytest.MonkeyPatch):
    graph, random = residual_graph(seed), np.random.default_rng(seed)
    importance = random.random(graph.num_units)
    limits = Limits(float(random.choice([0.3, 0.6, 1.0])), min_channels=int(random.integers(1, 5)))
    budget = {"macs": float(random.uniform(0.5, 0.9)), "params": float(random.uniform(0.5, 0.9))}
    options = {"limits": limits, "amount": {"macs": 0.2} if seed % 3 == 0 else None}
    taken = UnitPool.take_block
    blocks: list[int] = []

    def counted(pool, units, is_end):
        blocks.append(len(block) if (block := taken(pool, units, is_end)) is not None else 0)
        return block

    try:
        monkeypatch.setattr(UnitPool, "take_block", counted)
        plan = select(graph, importance, budget, **options)
    except ValueError:
        pytest.skip("the limits forbid this budget")
    assert max(blocks) > 1
    monkeypatch.setattr(UnitPool, "takes_blocks", lambda pool, resources: False)
    single = select(graph, importance, budget, **options)
    assert plan.remove.tolist() == single.remove.tolist()
    assert (plan.stopped, plan.closed, plan.costs) == (single.stopped, single.closed, single.costs)


def test_a_resource_that_may_rise_is_taken_unit_by_unit():
    out = np.arange(8)
    rises = Term("a.weight", 1, (out,), lambda number: 10.0 if number == 5 else 100.0)
    graph = ChannelGraph(
        8, {}, {"a.weight": out}, {"a.weight": 0}, {}, {"params": [Term("a.weight", 9, (out,))]}
    )
    graph.terms["seconds"] = [rises]
    plan = select(
        graph,
        np.arange(8.0),
        {"seconds": 0.5},
        limits=Limits(1.0, min_channels=1),
        dense=DenseSizes.of(graph),
    )
    assert plan.remove.tolist() == [
        0,
        1,
        2,
    ]  # a block of four would have missed the only number that meets it


def test_columns_and_rows_are_numbered_as_by_a_dictionary():
    random = np.random.default_rng(0)
    for _ in range(50):
        matrix = random.integers(0, 2, (3, 12)).repeat(random.integers(1, 4), axis=1)
        columns = [tuple((row, int(v)) for row, v in enumerate(column) if v) for column in matrix.T]
        assert number_columns(csc_matrix(matrix)) == number_equal(columns)
        assert number_rows(*matrix.tolist()) == number_equal(map(tuple, matrix.T.tolist()))[0]


@pytest.mark.slow
def test_a_selection_among_400000_units_takes_less_than_a_second():
    layers = {f"c{i}.weight": np.arange(i * 1000, (i + 1) * 1000) for i in range(400)}
    units = list(layers.values())
    read = [(), *((out,) for out in units[:-1])]
    terms = [Term(name, 9, (out, *inputs)) for (name, out), inputs in zip(layers.items(), read, strict=True)]
    graph = ChannelGraph(400_000, {}, layers, dict.fromkeys(layers, 0), {}, {"macs": terms, "params": terms})
    scores = np.random.default_rng(0).random(400_000)
    start = time.process_time()
    plan = select(graph, scores, {"macs": 0.5})
    assert time.process_time() - start < 3  # under 1 s alone on a processor of today
    assert plan.costs["macs"].after <= 0.5 * plan.costs["macs"].before
