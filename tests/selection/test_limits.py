"""Limits of parameters and of channels, by name and by type; errors name the limits that forbid a budget."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import FilterPruningCallback, Limits, prune_, select, trace
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.budget import check_budget, reachable
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.layer_patterns import class_distance
from lightning_prune.selection.limits import active_limits
from lightning_prune.selection.policy import PruningPolicy
from tests.selection.test_select import chain, tied
from tests.support.nets import assert_same, state

IMAGE = torch.zeros(1, 3, 8, 8)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm(self.conv1(x)).relu())


class WideBlock(Block):
    """The same block as another type."""


class Blocks(nn.Module):
    """Blocks of two types, a container of one layer, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.first, self.second = Block(12), WideBlock(12)
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x))).mean((2, 3))
        return self.head(self.hidden(x).relu())


def limits_by_name(limits: Limits) -> dict[str, tuple[float, str]]:
    return {
        name: (limit.share, limit.of) for name, limit in active_limits(trace(Blocks(), IMAGE), limits).items()
    }


def test_names_precede_types_long_names_precede_short_ones_and_near_types_precede_far_ones():
    limits = Limits(
        layers=0.5,
        overrides={
            nn.Module: 0.95,
            "Conv2d": 0.6,
            "torch.nn.Linear": {"share": 0.25, "of": "channels"},
            "first.*": 0.3,
            "first.conv2": 0.2,
            "head": 0.1,
            "Block": 0.8,
            "WideBlock": {"share": 0.7},
        },
    )
    assert limits_by_name(limits) == {
        "stem.0": (0.6, "params"),
        "first": (0.8, "params"),
        "first.conv1": (0.3, "params"),
        "first.conv2": (0.2, "params"),
        "second": (0.7, "params"),
        "second.conv1": (0.6, "params"),
        "second.conv2": (0.6, "params"),
        "hidden": (0.25, "channels"),
        "head": (0.1, "params"),
    }


def test_a_type_matches_every_name_under_which_it_can_be_imported():
    for name in ("Conv2d", "torch.nn.Conv2d", "torch.nn.modules.conv.Conv2d", "_ConvNd", nn.Conv2d):
        assert class_distance(nn.Conv2d, name) is not None
    for name in ("Conv", "nn.Conv2d", "torch.Conv2d", "object", nn.Conv1d):
        assert class_distance(nn.Conv2d, name) is None


@pytest.mark.parametrize("name", ["stem", "stem.0", "stem.0.weight", "s*m"])
def test_a_layer_matches_the_names_of_its_weight_and_of_containers_with_only_this_layer(name):
    """Such names once passed the check of patterns, but had no effect."""
    limits = Limits(layers=1.0, overrides={name: 0.0})
    assert limits_by_name(limits) == {"stem.0": (0.0, "params")}
    graph = trace(Blocks(), IMAGE)
    plan = select(graph, np.ones(graph.num_units), {"macs": 0.6}, limits=limits)
    assert graph.widths(plan)["stem.0.weight"] == 12


def filters_by_module(graph: ChannelGraph, removed: Any) -> dict[str, int]:
    """Count the filters of each layer and block, simply and slowly."""
    sizes: dict[str, int] = {}
    for weight, width in graph.widths(removed).items():
        layer = weight.removesuffix(".weight")
        for name in {layer, layer.split(".")[0]}:
            sizes[name] = sizes.get(name, 0) + width
    return sizes


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=6),
    st.booleans(),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.sampled_from([None, 0.4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**16),
)
def test_limits_of_channels_equal_brute_force(widths, tie, layers, blocks, floor, seed):
    graph = tied(chain(widths), seed) if tie else chain(widths)
    if not len(graph.prunable):
        return
    scores = np.random.default_rng(seed).random(graph.num_units)
    limits = Limits(layers=layers, blocks=blocks, of="channels", min_channels=floor)
    dense = filters_by_module(graph, [])
    plan = select(graph, scores, {"macs": 0.4}, limits=limits, dense=DenseSizes.of(graph))
    block_weights: dict[str, set[str]] = {}
    for weight in graph.layers:
        block_weights.setdefault(weight.split(".")[0], set()).add(weight)
    removed: list[int] = []
    for unit in sorted(graph.prunable.tolist(), key=lambda unit: (scores[unit], unit)):
        if graph.cost("macs", removed) <= 0.4 * graph.cost("macs"):
            break
        after, kept = filters_by_module(graph, [*removed, unit]), graph.kept([*removed, unit])
        weights = [weight for weight, units in graph.layers.items() if unit in units]
        shares = {weight.removesuffix(".weight"): layers for weight in weights}
        if blocks is not None:
            shares |= {b: blocks for b in {w.split(".")[0] for w in weights} if len(block_weights[b]) > 1}
        over = any(dense[name] - after[name] > share * dense[name] + 1e-6 for name, share in shares.items())
        names = [weight.removesuffix(".weight") for weight in weights]
        over |= any(after[name] < min(floor, math.ceil(dense[name] / 3)) for name in names)
        factors = [f for terms in graph.terms.values() for t in terms for f in t.factors]
        if not over and not any(unit in factor and not kept[factor].any() for factor in factors):
            removed.append(unit)
    assert list(plan) == removed


def test_limits_of_parameters_and_of_channels_hold_at_the_same_time():
    graph = trace(Blocks(), IMAGE)
    limits = Limits(layers=0.9, blocks=0.6, overrides={"Conv2d": {"share": 0.25, "of": "channels"}})
    dense = DenseSizes.of(graph)
    plan = select(graph, np.arange(graph.num_units)[::-1], {"macs": 0.05}, limits=limits, dense=dense)
    widths, whole = graph.widths(plan), graph.widths()
    convs = [name for name in widths if "conv" in name or "stem" in name]
    assert all(widths[name] == 0.75 * whole[name] for name in convs)
    assert widths["hidden.weight"] <= 0.25 * whole["hidden.weight"]
    assert plan.closed["first.conv1"] == "25% of its channels may go"


def test_limits_of_channels_refer_to_the_dense_network_after_a_cut_and_a_resume():
    model = Blocks()
    graph = trace(model, IMAGE)
    scores, limits = np.ones(graph.num_units), Limits(layers=0.5, of="channels")
    dense = DenseSizes.of(graph)
    assert dense.channels["first"] == 36
    first = select(graph, scores, {"macs": 0.2}, limits=limits, amount={"macs": 0.2}, dense=dense)
    record = prune_(model, graph, first)
    again = trace(model, IMAGE)
    saved = DenseSizes.from_dict(json.loads(json.dumps(dense.to_dict())))
    assert saved == dense
    old = {
        key: value for key, value in dense.to_dict().items() if key != "channels"
    }  # as version 0.1 wrote it
    assert DenseSizes.from_dict(old).completed(again, record.shapes) == dense
    second = select(again, np.ones(again.num_units), {"macs": 0.2}, limits=limits, dense=saved)
    for name, width in again.widths(second).items():
        assert width >= 0.5 * graph.widths()[name]
    assert not second.reached
    assert again.cost("macs", second) == reachable(graph, limits=limits)["macs"]


def budget_error(limits: Limits, **arguments: Any) -> str:
    """Return the error about a budget that cannot be met, and check that the model is not changed."""
    model = Blocks()
    before = state(model)
    with pytest.raises(ValueError, match="cannot be met") as raised:
        PruningPolicy({"macs": 0.05}, limits=limits, **arguments).check(trace(model, IMAGE))
    assert_same(state(model), before)
    return str(raised.value)


def test_the_error_about_a_budget_names_the_limits_and_the_reachable_share():
    limits = Limits(layers=0.5, blocks=0.9, overrides={"first.*": 0.1, "Linear": {"share": 0.0}})
    message, graph = budget_error(limits), trace(Blocks(), IMAGE)
    least = reachable(graph, limits=limits)["macs"] / graph.cost("macs")
    assert f"({least:.3f} of the dense model; without limits 0.0" in message
    assert "limits layers=0.5, which closes " in message
    assert "limits overrides['first.*']=0.1, which closes first.conv" in message
    assert "limits overrides['Linear']={'share': 0.0}, which closes hidden" in message
    assert "2 pinned channels (is the network's output)" in message
    assert "strict" not in message
    assert "exclude" not in message


def test_the_error_about_a_budget_names_exclusions_multiples_and_strictness():
    message = budget_error(Limits(layers=0.5, strict=True), exclude=["first"], channel_multiple=4)
    assert "strict=True" in message
    assert "exclude=['first'], which means first.conv1.weight, first.conv2.weight" in message
    assert "channel_multiple=4" in message


def test_limits_of_zero_forbid_every_budget_below_the_dense_network():
    message = budget_error(Limits(layers=0.0))
    assert "1.000 of the dense model" in message
    assert "limits layers=0.0, which closes stem.0, " in message
    check_budget(trace(Blocks(), IMAGE), {"macs": 1.0}, limits=Limits(layers=0.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": 1.5}, r"layers=1.5 must be a share in \[0, 1\]"),
        ({"blocks": -0.1}, r"blocks=-0.1 must be a share in"),
        ({"overrides": {"head": 2}}, r"overrides\['head'\]=2 must be a share in \[0, 1\], got 2"),
        ({"overrides": {nn.Linear: "most"}}, r"overrides\['Linear'\]=most must be a share"),
        ({"overrides": {"head": {"of": "channels"}}}, "must have a 'share' or 'min_channels'"),
        ({"overrides": {"head": {}}}, "must have a 'share' or 'min_channels'"),
        ({"min_channels": 0}, "min_channels must be an integer of at least 1, got 0"),
        ({"min_channels": True}, "min_channels must be an integer of at least 1, got True"),
        ({"overrides": {"head": {"min_channels": 2.5}}}, r"got 2.5 in overrides\['head'\]="),
        ({"overrides": {"head": {"share": 0.5, "off": "channels"}}}, "may have an 'of', nothing else"),
        ({"overrides": {"head": {"share": 0.5, "of": "macs"}}}, "must be of params or channels, got 'macs'"),
        ({"of": "filters"}, "must be of params or channels, got 'filters'"),
        ({"of": "channels", "strict": True}, "strict=True concerns parameters"),
    ],
)
def test_invalid_limits_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Limits(**bad)


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [("fist.conv1", "first.conv1"), ("Conv3d", "Conv2d"), (nn.Conv1d, "Conv2d"), ("norm", "")],
)
def test_patterns_without_a_match_are_refused_and_the_model_is_not_changed(pattern, suggestion):
    model = Blocks()
    before, graph = state(model), trace(model, IMAGE)
    with pytest.raises(ValueError, match=rf"matches no layer or block.*did you mean .*{suggestion}"):
        select(graph, np.ones(graph.num_units), {"macs": 0.5}, limits=Limits(overrides={pattern: 0.5}))
    assert_same(state(model), before)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"exclude": ["frist"]}, "exclude 'frist' matches no layer; did you mean 'first"),
        ({"exclude": ["*"]}, "covers every layer; exclude fewer"),
        ({"budget": {"mac": 0.5}}, "unknown resource 'mac' in budget; known are .*; did you mean 'macs'"),
        ({"amount": {"macs": -1}}, "amount of macs must be a share"),
        ({"channel_multiple": 64}, r"cannot be met.*channel_multiple=64"),
    ],
)
def test_an_invalid_policy_is_refused_and_the_model_is_not_changed(bad, message):
    model = Blocks()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        PruningPolicy(**{"budget": {"macs": 0.5}, **bad}).check(trace(model, IMAGE))
    assert_same(state(model), before)


def test_limits_by_the_name_of_a_type_work_in_a_callback():
    callback = FilterPruningCallback(
        {"macs": 0.5}, limits=Limits(overrides={"torch.nn.Linear": {"share": 0.5}})
    )
    callback.policy.check(trace(Blocks(), IMAGE))
    with pytest.raises(ValueError, match=r"'torch\.nn\.Conv1d' matches no layer"):
        PruningPolicy({"macs": 0.5}, limits=Limits(overrides={"torch.nn.Conv1d": 0.5})).check(
            trace(Blocks(), IMAGE)
        )
