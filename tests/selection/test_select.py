"""Selection: exact, in order, within limits; compared with slow and simple implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term
from lightning_prune.selection.budget import check_budget, reachable
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.incremental_cost import IncrementalCost
from lightning_prune.selection.layer_patterns import excluded_layers
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.select import select
from lightning_prune.utils.formatting import si


def chain(widths: list[int], hw: int = 10, per_block: int = 2, pin_last: bool = True) -> ChannelGraph:
    """Convolutions in a row, named ``b<block>.c<i>``, each with a bias and a norm."""
    layers, macs, params, pinned, start, inputs = {}, [], [], {}, 0, None
    for i, width in enumerate(widths):
        units = np.arange(start, start + width)
        start += width
        name = f"b{i // per_block}.c{i}"
        layers[f"{name}.weight"] = units
        factors, scale = ((units,), 27) if inputs is None else ((units, inputs), 9)
        params += [Term(f"{name}.weight", scale, factors), Term(f"{name}.bias", 1, (units,))]
        params += [Term(f"b{i // per_block}.n{i}.weight", 1, (units,))]
        macs += [Term(f"{name}.weight", scale * hw * (i + 1), factors)]
        inputs = units
    if pin_last:
        pinned = dict.fromkeys(range(start - widths[-1], start), "output of the network")
    return ChannelGraph(start, {}, layers, dict.fromkeys(layers, 0), pinned, {"macs": macs, "params": params})


def tied(graph: ChannelGraph, seed: int) -> ChannelGraph:
    """Return the same network with a random third of its units merged with others, as residual connections do."""
    rng = np.random.default_rng(seed)
    target = np.arange(graph.num_units)
    for unit in rng.choice(graph.num_units, graph.num_units // 3, replace=False):
        target[unit] = target[rng.integers(graph.num_units)]

    def remap(units: np.ndarray) -> np.ndarray:
        return target[units]

    return ChannelGraph(
        graph.num_units,
        {},
        {name: remap(units) for name, units in graph.layers.items()},
        graph.filter_dims,
        {int(target[unit]): reason for unit, reason in graph.pinned.items()},
        {
            r: [Term(t.layer, t.scale, tuple(map(remap, t.factors))) for t in ts]
            for r, ts in graph.terms.items()
        },
    )


def layer_params(graph: ChannelGraph, removed: list[int]) -> dict[str, int]:
    """Count the parameters of each layer and block, simply and slowly."""
    kept, sizes = graph.kept(removed), {}
    for term in graph.terms["params"]:
        size = term.scale * math.prod(int(kept[factor].sum()) for factor in term.factors)
        module = term.layer.rpartition(".")[0]
        for name in {module, module.split(".")[0]}:
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def brute_force(graph, scores, targets, limits: Limits) -> list[int]:
    """Try each unit in order, recompute everything, and remove the unit if no limit forbids it."""
    dense, removed = layer_params(graph, []), []
    for unit in sorted(graph.prunable.tolist(), key=lambda u: (scores[u], u)):
        if all(graph.cost(resource, removed) <= target for resource, target in targets.items()):
            break
        after = layer_params(graph, [*removed, unit])
        kept = graph.kept([*removed, unit])
        factors = [f for terms in graph.terms.values() for t in terms for f in t.factors]
        empty = any(unit in factor and not kept[factor].any() for factor in factors)
        layers = {name.rpartition(".")[0] for name, units in graph.layers.items() if unit in units}
        watched = layers | {name.split(".")[0] for name in layers}
        limit_of = {n: limits.of_block(n) if n.count(".") == 0 else limits.of_layer(n) for n in watched}
        allowed = {n: None if limit is None else limit.share for n, limit in limit_of.items()}
        over = any(dense[n] - after[n] > a * dense[n] + 1e-6 for n, a in allowed.items() if a is not None)
        wide = {n: len(units) for n, units in graph.layers.items() if unit in units}
        narrow = any(
            kept[graph.layers[n]].sum() < min(limits.min_channels, math.ceil(w / 3)) for n, w in wide.items()
        )
        if not empty and not over and not narrow:
            removed.append(unit)
    return removed


networks = st.builds(
    lambda widths, seed, tie: tied(chain(widths), seed) if tie else chain(widths),
    st.lists(st.integers(1, 9), min_size=3, max_size=6),
    st.integers(0, 99),
    st.booleans(),
).filter(lambda graph: len(graph.prunable) > 0)
rules = st.builds(
    Limits,
    layers=st.sampled_from([0.4, 0.75, 1.0]),
    blocks=st.sampled_from([None, 0.5, 0.8]),
    overrides=st.sampled_from([{}, {"b0": 0.3}, {"b0.*": 0.9}]),
    min_channels=st.sampled_from([1, 2, 4]),
)


@settings(deadline=None, max_examples=150)
@given(networks, rules, st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 2**16))
def test_equals_brute_force(graph, limits, share, seed):
    scores = np.random.default_rng(seed).integers(0, 5, graph.num_units).astype(float)  # many ties
    dense = DenseSizes.of(graph)
    plan = select(graph, scores, {"macs": share, "params": share}, limits=limits, dense=dense)
    targets = {resource: share * graph.cost(resource) for resource in ("macs", "params")}
    assert list(plan) == brute_force(graph, scores, targets, limits)
    assert plan.reached == all(graph.cost(r, plan) <= t for r, t in targets.items())
    assert {r: s.after for r, s in plan.costs.items()} == {r: graph.cost(r, plan) for r in plan.costs}


@settings(deadline=None, max_examples=100)
@given(networks, rules, st.integers(0, 2**16))
def test_no_selection_goes_below_the_reachable_bound(graph, limits, seed):
    scores = np.random.default_rng(seed).random(graph.num_units)
    bound = reachable(graph, limits=limits)
    plan = select(graph, scores, {"macs": 1e-9}, limits=limits, dense=DenseSizes.of(graph))
    assert not plan.reached
    assert all(plan.costs[resource].after >= least for resource, least in bound.items())


@settings(deadline=None, max_examples=100)
@given(networks, st.integers(0, 2**16))
def test_strict_limits_hold_for_every_layer(graph, seed):
    scores = np.random.default_rng(seed).random(graph.num_units)
    limits = Limits(layers=0.6, blocks=0.5, strict=True)
    plan = select(graph, scores, {"macs": 1e-9}, limits=limits, dense=DenseSizes.of(graph))
    dense, after = layer_params(graph, []), layer_params(graph, list(plan))
    for name, size in dense.items():
        limit = limits.blocks if "." not in name else limits.layers
        is_norm = ".n" in name
        holds_one = "." not in name and sum(n.startswith(name + ".") for n in graph.layers) < 2
        assert is_norm or holds_one or size - after[name] <= limit * size + 1e-6


@settings(deadline=None, max_examples=60)
@given(networks, st.integers(0, 2**16))
def test_the_incremental_cost_equals_the_cost_model_after_any_moves(graph, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(graph.num_units)
    for resource, model in graph.cost_models.items():
        cost = IncrementalCost(model)
        removed: list[int] = []
        for unit in order.tolist():
            cost.shift(unit, -1)
            removed.append(unit)
            if rng.random() < 0.4:
                cost.shift(removed.pop(), 1)
            assert cost.total == graph.cost(resource, removed)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0.3, 0.6, 0.9]),
    st.integers(0, 2**16),
)
def test_layers_that_are_cut_keep_multiples_not_below_the_ranking(widths, multiple, share, seed):
    graph = chain(widths)
    scores = np.random.default_rng(seed).random(graph.num_units)
    dense, free = DenseSizes.of(graph), Limits(layers=1.0, min_channels=1)
    rounded = select(graph, scores, {"macs": share}, limits=free, channel_multiple=multiple, dense=dense)
    threshold = scores[rounded.remove].max() if len(rounded) else -1.0
    for name, kept in graph.widths(rounded).items():
        units = graph.layers[name]
        ranked = (
            len(units) - int((scores[units] <= threshold).sum()) if name != list(graph.layers)[-1] else kept
        )
        assert kept == len(units) or kept % multiple == 0
        assert kept == len(units) or ranked <= kept < max(ranked, 1) + multiple


def test_twenty_channels_at_thirty_percent_become_sixteen_not_eight():
    graph = chain([20], pin_last=False)
    plan = select(graph, np.arange(20.0), {"macs": 0.99}, channel_multiple=8)
    assert graph.widths(plan) == {"b0.c0.weight": 16}
    assert list(plan) == [0, 1, 2, 3]


def test_the_last_unit_needed_is_the_last_taken():
    graph = chain([8, 8, 8])
    scores = np.random.default_rng(0).random(24)
    plan = select(graph, scores, {"macs": 0.5}, limits=Limits(layers=1.0))
    assert plan.reached
    assert not graph.cost("macs", list(plan)[:-1]) <= 0.5 * graph.cost("macs")


def test_ties_are_broken_by_unit_number():
    plan = select(chain([6, 4]), np.zeros(10), {"macs": 0.6})
    assert list(plan) == [0, 1, 2]


def test_units_of_infinite_importance_are_never_removed():
    scores = np.where(np.arange(10) == 1, np.inf, 0.0)
    plan = select(
        chain([6, 4]), scores, {"macs": 0.01}, limits=Limits(1.0), dense=DenseSizes.of(chain([6, 4]))
    )
    assert 1 not in list(plan)
    assert not plan.reached
    assert plan.stopped == "limits"


def test_a_step_ends_with_the_unit_by_which_its_amount_is_removed():
    graph = chain([10, 10, 4])
    scores = np.random.default_rng(1).random(24)
    plan = select(graph, scores, {"macs": 0.3}, amount={"macs": 0.1})
    lost = [graph.cost("macs") - graph.cost("macs", list(plan)[:n]) for n in (len(plan) - 1, len(plan))]
    assert lost[0] < 0.1 * graph.cost("macs") <= lost[1]
    assert plan.stopped == "amount"
    absolute = select(graph, scores, {"macs": 0.3}, amount={"macs": 0.1 * graph.cost("macs")})
    assert list(absolute) == list(plan)


def cut(graph: ChannelGraph, removed) -> tuple[ChannelGraph, np.ndarray]:
    """Return the graph of the network after the cut, and the old number of each of its units."""
    widths = list(graph.widths(removed).values())
    return chain(widths), np.flatnonzero(graph.kept(removed))


def test_limits_and_budgets_refer_to_the_dense_network_after_a_cut():
    graph = chain([12, 12, 12, 4])
    dense, scores = DenseSizes.of(graph), np.random.default_rng(2).random(40)
    limits = Limits(layers=0.5)
    whole = select(graph, scores, {"macs": 0.4}, limits=limits, dense=dense)
    first = select(graph, scores, {"macs": 0.4}, limits=limits, amount={"macs": 0.2}, dense=dense)
    smaller, old = cut(graph, first)
    second = select(smaller, scores[old], {"macs": 0.4}, limits=limits, dense=dense)
    assert len(second)
    assert sorted([*first, *old[list(second)]]) == sorted(whole)
    assert second.costs["macs"].dense == graph.cost("macs")


def test_dense_sizes_survive_json():
    import json

    sizes = DenseSizes.of(chain([4, 4]))
    assert DenseSizes.from_dict(json.loads(json.dumps(sizes.to_dict()))) == sizes
    assert sizes.params["b0.c0"] == 27 * 4 + 4
    assert sizes.params["b0"] == 27 * 4 + 4 + 4 + 9 * 16 + 4 + 4


def test_a_limit_of_zero_keeps_a_layer_whole_while_others_are_cut():
    graph = chain([6, 6, 6, 2])
    limits = Limits(layers=1.0, overrides={"b0.c1": 0.0}, min_channels=1)
    plan = select(graph, np.arange(20.0), {"macs": 0.3}, limits=limits)
    widths = graph.widths(plan)
    assert widths["b0.c1.weight"] == 6
    assert widths["b0.c0.weight"] < 6


def test_a_named_block_is_closed_as_a_whole():
    graph = chain([8, 8, 8, 8, 8, 2])
    limits = Limits(layers=1.0, overrides={"b0": 0.25})
    plan = select(graph, np.arange(42.0), {"macs": 0.3}, limits=limits, dense=DenseSizes.of(graph))
    dense, after = layer_params(graph, []), layer_params(graph, list(plan))
    assert 0 < dense["b0"] - after["b0"] <= 0.25 * dense["b0"]
    assert "b0" in plan.closed


def test_the_longest_override_wins():
    limits = Limits(overrides={"b*": 0.1, "b1.*": 0.2, "b1.c3": 0.3})
    assert [limits.of_layer(name).share for name in ("b0.c0", "b1.c2", "b1.c3", "z")] == [0.1, 0.2, 0.3, 0.75]


def test_excluded_layers_keep_their_filters_by_name_glob_or_container():
    graph = chain([6, 6, 6, 6, 2])
    assert excluded_layers(graph, ["b0"]) == {"b0.c0.weight", "b0.c1.weight"}
    assert excluded_layers(graph, ["*.c2"]) == {"b1.c2.weight"}
    assert excluded_layers(graph, ["b0.c1.weight"]) == {"b0.c1.weight"}
    plan = select(graph, np.arange(26.0), {"macs": 0.8}, exclude=["b0", "*.c2"])
    widths = graph.widths(plan)
    assert [widths[f"b{i // 2}.c{i}.weight"] for i in range(3)] == [6, 6, 6]
    assert len(plan)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"budget": {"macs": 0.0}}, r"in \(0, 1\]"),
        ({"budget": {"macs": -0.5}}, r"in \(0, 1\]"),
        ({"budget": {"macs": float("nan")}}, r"in \(0, 1\]"),
        ({"budget": {"mac": 0.5}}, r"unknown resource 'mac' in budget; known are macs, params"),
        ({"amount": {"mac": 0.5}}, r"unknown resource 'mac' in amount"),
        ({"exclude": ["b0.c9"]}, r"'b0.c9' matches no layer; did you mean 'b0\.c"),
        (
            {"limits": Limits(overrides={"b0.cc": 0.5})},
            r"limit 'b0.cc' matches no layer or .*; did you mean 'b0\.c",
        ),
        ({"exclude": ["*"]}, r"covers every layer"),
        ({"channel_multiple": 0}, r"at least 1"),
        ({"importance": np.zeros(3)}, r"shape \(18,\)"),
        ({"importance": np.full(18, np.nan)}, r"NaN for 16 units, in b0.c0.weight"),
        ({"budget": {"macs": 0.001}}, r"cannot be met.*keep at least .* \(0\.\d+ of the dense model;"),
        ({"limits": Limits(layers=0.1)}, r"cannot be met"),
    ],
)
def test_invalid_input_is_refused_with_a_message_that_names_it(bad, message):
    arguments = {"importance": np.arange(18.0), "budget": {"macs": 0.5}, **bad}
    with pytest.raises(ValueError, match=message):
        select(chain([8, 8, 2]), **arguments)


def test_a_network_without_anything_to_prune_raises_an_error_with_the_reason():
    graph = chain([4])
    with pytest.raises(
        ValueError, match=r"nothing to prune: every filter must stay \(output of the network\)"
    ):
        select(graph, np.zeros(4), {"macs": 0.5})
    empty = ChannelGraph(0, {}, {}, {}, {}, {"macs": [], "params": []})
    with pytest.raises(ValueError, match="no convolution or linear"):
        select(empty, np.zeros(0), {"macs": 0.5})


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_limits_out_of_range(share):
    with pytest.raises(ValueError, match="share in"):
        Limits(overrides={"x": share})


def test_a_budget_that_is_already_met_removes_nothing():
    plan = select(chain([8, 8, 2]), np.arange(18.0), {"macs": 1.0})
    assert len(plan) == 0
    assert plan.reached


def test_all_budgets_must_be_met():
    graph = chain([16, 16, 16, 4], hw=1)
    scores = np.random.default_rng(3).random(52)
    both = select(graph, scores, {"macs": 0.7, "params": 0.4})
    assert both.costs["macs"].after <= 0.7 * graph.cost("macs")
    assert both.costs["params"].after <= 0.4 * graph.cost("params")


def test_plans_and_bounds_are_readable():
    graph = chain([8, 8, 2])
    plan = select(graph, np.arange(18.0), {"macs": 0.01}, dense=DenseSizes.of(graph))
    assert "budget not met, no candidate left (b0.c0: at least 3 of its channels stay; b0.c1: " in str(plan)
    assert "% of dense, budget 1.0%" in str(plan)
    check_budget(graph, {"macs": 0.5})
    assert [si(n) for n in (999, 999_600, 1e9, 155.93e9)] == ["999", "1000k", "1G", "156G"]


def test_twenty_thousand_units_under_all_limits_meet_both_budgets():
    """The time that it takes is measured by ``python -m benchmarks.speed.selection``."""
    graph = chain([200] * 100, per_block=4)
    scores = np.random.default_rng(0).random(graph.num_units)
    limits = Limits(layers=0.8, blocks=0.75, overrides={"b3*": 0.5, "b4.*": 0.9})
    plan = select(graph, scores, {"macs": 0.3, "params": 0.4}, limits=limits, channel_multiple=4)
    assert len(plan) > 8000
    assert plan.reached
