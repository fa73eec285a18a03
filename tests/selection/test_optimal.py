"""Optimal selection: the same optimum as trying out every plan, under budgets, limits and multiples."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import Limits, OptimalSelection, PruningPolicy, one_shot, prune_, select, trace
from lightning_prune.criteria import L2
from lightning_prune.graph.channel_graph import ChannelGraph, Multiple
from lightning_prune.graph.costs import Term
from lightning_prune.graph.layer_costs import LayerCost
from lightning_prune.selection.budget import check_budget
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.integer_program import Expression, IntegerProgram
from tests.selection.test_select import chain, tied

EXACT = OptimalSelection(gap=0)
FREE = Limits(layers=1.0, min_channels=1)


def lossless_cuts(graph: ChannelGraph, limits: Limits, multiple: int) -> Iterator[tuple[int, ...]]:
    """Yield every set of removable units that empties no dimension and keeps shares, floors and multiples."""
    dense = {name: len(units) for name, units in graph.layers.items()}
    for number in range(len(graph.prunable) + 1):
        for remove in itertools.combinations(graph.prunable.tolist(), number):
            kept = graph.kept(remove)
            factors = [f for terms in graph.terms.values() for term in terms for f in term.factors]
            widths = graph.widths(remove)
            if all(kept[factor].any() for factor in factors) and all(
                width >= dense[name] * (1 - limits.layers) - 1e-9
                and width >= min(limits.min_channels, -(-dense[name] // 3))
                and (width % multiple == 0 or width == dense[name])
                for name, width in widths.items()
            ):
                yield remove


def least_loss(
    graph: ChannelGraph, scores: np.ndarray, budget: Mapping[str, float], limits: Limits, multiple: int = 1
) -> float:
    """Return the least importance that any allowed cut removes to meet the budget."""
    targets = {resource: share * graph.cost(resource) for resource, share in budget.items()}
    losses = [
        scores[list(remove)].sum()
        for remove in lossless_cuts(graph, limits, multiple)
        if all(graph.cost(resource, remove) <= target for resource, target in targets.items())
    ]
    return min(losses, default=np.inf)


def with_latency(graph: ChannelGraph, seed: int) -> ChannelGraph:
    """Add a resource of random, stepped functions: of one layer, of two, and of two that are concatenated."""
    table = np.random.default_rng(seed).random((16, 16)).cumsum(0).cumsum(1) // 0.7
    first, second, third, *_ = graph.layers.values()
    joined = np.concatenate([first, second])
    terms = [
        Term("a", 10, (first,), lambda a: table[a, a]),
        Term("b", 10, (first, second), lambda a, b: table[a, b]),
        Term("c", 10, (joined, third), lambda a, b: table[a, b]),
    ]
    return replace(graph, terms={**graph.terms, "latency": terms})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "budget", [{"macs": 0.5}, {"macs": 0.7, "params": 0.6}, {"latency": 0.5, "params": 0.7}]
)
def test_optimum_is_that_of_all_plans(seed: int, budget: dict[str, float]) -> None:
    graph = chain([4, 4, 3, 3], hw=seed + 1)
    graph = with_latency(tied(graph, seed) if seed % 2 else graph, seed)
    scores = np.random.default_rng(seed).random(graph.num_units)
    plan = select(graph, scores, budget, limits=FREE, selection=EXACT)
    assert plan.reached
    assert plan.gap == pytest.approx(0, abs=1e-9)
    assert scores[plan.remove].sum() == pytest.approx(least_loss(graph, scores, budget, FREE))


@pytest.mark.parametrize("limits", [Limits(0.5, of="channels", min_channels=1), Limits(1.0, min_channels=2)])
@pytest.mark.parametrize("seed", range(3))
def test_limits_and_floors_hold_as_in_the_best_of_all_plans(limits: Limits, seed: int) -> None:
    graph = chain([4, 6, 4, 2], hw=seed + 1)
    scores = np.random.default_rng(seed).random(graph.num_units)
    plan = select(graph, scores, {"macs": 0.6}, limits=limits, selection=EXACT)
    assert scores[plan.remove].sum() == pytest.approx(least_loss(graph, scores, {"macs": 0.6}, limits))


def test_a_limit_of_a_block_binds_its_layers_together() -> None:
    graph = chain([6, 6, 6, 3], per_block=2)
    scores = np.arange(graph.num_units, dtype=float)
    limits = Limits(1.0, blocks=0.5, of="channels", min_channels=1)
    plan = select(graph, scores, {"macs": 0.45}, limits=limits, selection=EXACT)
    widths = list(graph.widths(plan.remove).values())
    assert plan.reached
    assert sum(widths[:2]) >= 6
    free = select(graph, scores, {"macs": 0.45}, limits=FREE, selection=EXACT)
    assert sum(list(graph.widths(free.remove).values())[:2]) < 6


def test_widths_are_multiples_and_the_best_of_them() -> None:
    graph = chain([4, 4, 4, 2])
    scores = np.random.default_rng(0).random(graph.num_units)
    plan = select(graph, scores, {"macs": 0.6}, limits=FREE, channel_multiple=2, selection=EXACT)
    assert {width % 2 for width in list(graph.widths(plan.remove).values())[:3]} == {0}
    expected = least_loss(graph, scores, {"macs": 0.6}, FREE, multiple=2)
    assert scores[plan.remove].sum() == pytest.approx(expected)


def test_multiples_that_operators_need_are_kept() -> None:
    graph = chain([8, 4, 2])
    graph.multiples.append(Multiple(graph.layers["b0.c0.weight"], 4, "a grouped product"))
    plan = select(graph, np.arange(14.0), {"macs": 0.9}, limits=FREE, selection=EXACT)
    assert graph.widths(plan.remove)["b0.c0.weight"] in (4, 8)


def test_excluded_pinned_and_infinitely_important_units_stay() -> None:
    graph = chain([6, 6, 6, 3])
    scores = np.ones(graph.num_units)
    scores[6:9] = np.inf
    plan = select(graph, scores, {"macs": 0.6}, exclude=["b0.c0"], limits=FREE, selection=EXACT)
    assert plan.reached
    assert not set(plan.remove.tolist()) & ({*range(9)} | set(graph.pinned))


def test_stairs_of_the_device_are_used_within_the_program() -> None:
    graph = chain([64, 64, 8])
    first, second, _ = graph.layers.values()
    stairs = Term("stairs", 1, (first, second), lambda a, b: (-(-a // 16)) * (-(-b // 16)))
    graph = replace(graph, terms={**graph.terms, "latency": [stairs]})
    plan = select(graph, np.ones(graph.num_units), {"latency": 0.5}, limits=FREE, selection="optimal")
    widths = list(graph.widths(plan.remove).values())
    assert sorted(widths[:2]) == [
        32,
        64,
    ]  # 2 x 4 of 16 blocks; each other 8 blocks or fewer keep fewer channels


def test_terms_of_many_layers_are_linearised_and_yet_meet_the_budget() -> None:
    graph = chain([40, 40, 40, 40, 2])
    joined = np.concatenate(list(graph.layers.values())[:4])
    root = Term("all", 100, (joined, graph.layers["b1.c3.weight"]), lambda a, b: (a * b) ** 0.5)
    graph = replace(graph, terms={**graph.terms, "latency": [root]})
    scores = np.random.default_rng(0).random(graph.num_units)
    plan = select(graph, scores, {"latency": 0.5, "macs": 0.8}, limits=FREE, selection="optimal")
    greedy = select(graph, scores, {"latency": 0.5, "macs": 0.8}, limits=FREE)
    assert plan.reached
    assert scores[plan.remove].sum() < scores[greedy.remove].sum()


def test_a_block_that_vanishes_as_a_whole_is_one_binary_choice() -> None:
    """A gate of one unit in all terms of a block, with a choice of widths within the block."""
    stem, inner, gate = np.arange(4), np.arange(4, 8), np.array([8])
    terms = [Term("stem", 10, (stem,)), Term("a", 5, (stem, inner, gate)), Term("b", 5, (inner, stem, gate))]
    graph = ChannelGraph(
        9, {}, {"s": stem, "i": inner, "g": gate}, {}, {}, {"macs": terms}, optional=[np.arange(4, 9)]
    )
    scores = np.array([9.0, 9, 9, 9, 1, 1, 1, 1, 2.5])
    plan = select(graph, scores, {"macs": 0.3}, limits=FREE, selection=EXACT)
    assert plan.remove.tolist() == [
        8
    ]  # 40 of 200 remain; without the gate, three inner channels would cost 3
    plan = select(graph, scores, {"macs": 0.65}, limits=FREE, selection=EXACT)
    assert set(plan.remove.tolist()) < {4, 5, 6, 7}
    assert len(plan) == 2


def test_a_step_removes_its_amount_at_least_loss() -> None:
    graph = chain([8, 8, 8, 2])
    scores = np.random.default_rng(1).random(graph.num_units)
    plan = select(graph, scores, {"macs": 0.3}, amount={"macs": 0.2}, limits=FREE, selection=EXACT)
    assert plan.stopped == "amount"
    assert plan.costs["macs"].share <= 0.8
    whole = select(graph, scores, {"macs": 0.8}, limits=FREE, selection=EXACT)
    assert scores[plan.remove].sum() == pytest.approx(scores[whole.remove].sum())


def test_a_step_ends_with_the_first_of_its_amounts() -> None:
    graph = chain([6, 6, 6, 2], hw=3)
    scores = np.random.default_rng(2).random(graph.num_units)
    budget, amount = {"macs": 0.3, "params": 0.3}, {"macs": 0.2, "params": 0.4}
    plan = select(graph, scores, budget, amount=amount, limits=FREE, selection=EXACT)
    losses = [
        scores[select(graph, scores, goal, limits=FREE, selection=EXACT).remove].sum()
        for goal in ({"macs": 0.8}, {"params": 0.6})
    ]
    assert scores[plan.remove].sum() == pytest.approx(min(losses))


BLOCKS = Limits(1.0, blocks=0.3, of="channels", min_channels=1)


def test_a_budget_that_no_plan_meets_is_refused_with_how_far_one_gets() -> None:
    """Each layer alone may nearly vanish, so no bound of a single layer shows that the block may not."""
    graph = chain([10, 10, 10, 2])
    check_budget(graph, {"macs": 0.35}, limits=BLOCKS)
    with pytest.raises(
        ValueError, match=r"no plan meets the budget macs=0\.35 .* the nearest leaves macs"
    ) as error:
        select(graph, np.ones(32), {"macs": 0.35}, limits=BLOCKS, selection="optimal")
    share = float(re.findall(r"\(([\d.]+) of the dense", str(error.value))[0])
    nearest = select(graph, np.ones(32), {"macs": share + 1e-3}, limits=BLOCKS, selection="optimal")
    assert nearest.reached
    assert share > 0.35
    with pytest.raises(ValueError, match="no plan meets"):
        select(graph, np.ones(32), {"macs": share - 5e-3}, limits=BLOCKS, selection="optimal")


def test_after_the_first_cut_the_nearest_plan_says_that_limits_ended_it() -> None:
    graph = chain([10, 10, 10, 2])
    options: dict[str, Any] = {"limits": BLOCKS, "selection": "optimal", "dense": DenseSizes.of(graph)}
    plan = select(graph, np.ones(32), {"macs": 0.35}, **options)
    assert plan.stopped == "limits"
    assert not plan.reached
    assert plan.closed


def test_policy_is_refused_before_anything_changes() -> None:
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    limits = Limits(1.0, overrides={"body": {"share": 0.3, "of": "channels"}}, min_channels=1)
    policy = PruningPolicy({"macs": 0.26}, limits=limits, selection="optimal")
    with pytest.raises(ValueError, match="no plan meets the budget"):
        one_shot(net, IMAGE, policy)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_too_little_time_takes_the_best_plan_so_far_and_says_how_good_it_is() -> None:
    graph = chain([40] * 12)
    scores = np.random.default_rng(0).random(graph.num_units)
    hurried = OptimalSelection(time_limit=1e-6)
    with pytest.warns(
        UserWarning, match=r"not optimal: the solver ran out of its 1e-06 s; the best plan so far"
    ):
        plan = select(graph, scores, {"macs": 0.5}, limits=FREE, selection=hurried)
    assert plan.reached
    assert plan.remove.tolist() == sorted(plan.remove.tolist(), key=lambda unit: (scores[unit], unit))


def test_too_large_a_program_takes_the_greedy_plan() -> None:
    graph = chain([8, 8, 2])
    small = OptimalSelection(variables=3)
    with pytest.warns(UserWarning, match="too many classes of channels"):
        plan = select(graph, np.arange(18.0), {"macs": 0.5}, limits=FREE, selection=small)
    greedy = select(graph, np.arange(18.0), {"macs": 0.5}, limits=FREE)
    assert plan.remove.tolist() == greedy.remove.tolist()
    assert plan.gap == np.inf


@pytest.mark.parametrize("selection", ["best", 3, None])
def test_an_unknown_selection_is_refused(selection: Any) -> None:
    with pytest.raises(ValueError, match="selection must be 'greedy', 'optimal'"):
        PruningPolicy({"macs": 0.5}, selection=selection)


@pytest.mark.parametrize("arguments", [{"time_limit": 0}, {"gap": 1.0}, {"widths": 2}, {"variables": 0}])
def test_settings_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        OptimalSelection(**arguments)


class Net(nn.Module):
    """A residual block, a concatenation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 12, 3, padding=1))
        self.side = nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(18, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = y + self.body(y.relu())
        return self.head(torch.cat([y, self.side(x)], 1))


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("multiple", [1, 4])
def test_an_optimal_cut_is_proven_and_costs_what_the_plan_says(multiple: int) -> None:
    torch.manual_seed(0)
    net = Net()
    graph = trace(net, IMAGE).with_resources(
        {"latency": LayerCost(lambda layer, a, b: -(-a // 4) * -(-b // 4))}
    )
    scores, budget = L2()(graph, net), {"macs": 0.6, "latency": 0.6}
    options: dict[str, Any] = {"limits": FREE, "channel_multiple": multiple}
    plan = select(graph, scores, budget, selection=EXACT, **options)
    greedy = select(graph, scores, budget, **options)
    assert scores[plan.remove].sum() <= scores[greedy.remove].sum() + 1e-9
    prune_(net, graph, plan)
    smaller = trace(net, IMAGE)
    assert (smaller.cost("macs"), smaller.cost("params")) == tuple(
        plan.costs[r].after for r in ("macs", "params")
    )
    assert net(torch.rand(2, 3, 8, 8)).shape == (2, 4, 8, 8)


def test_program_finds_the_least_loss_under_a_pairwise_cost() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        losses, cost = rng.random((3, 4)), rng.random((3, 3, 4, 4))
        program, total = IntegerProgram(), Expression()
        choices = [program.choice(range(4), row) for row in losses]
        for a, b in itertools.combinations(range(3), 2):
            total.add(program.pair(choices[a], choices[b]), cost[a, b])
        program.at_most(total, 0.9)
        expected = min(
            (
                losses[range(3), levels].sum()
                for levels in itertools.product(range(4), repeat=3)
                if sum(cost[a, b][levels[a], levels[b]] for a, b in itertools.combinations(range(3), 2))
                <= 0.9
            ),
            default=np.inf,
        )
        assert program.solve().value == pytest.approx(expected)
