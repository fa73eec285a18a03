"""Floors in channels: narrow layers keep some channels, whatever shares allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import Limits, prune_, select, trace
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.netadapt.alignment import surplus_units
from lightning_prune.selection.budget import check_budget
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.slimming.policy import SlimmingPolicy

IMAGE = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """A stem, two blocks that add to it (one depthwise inside), a squeeze-excite gate, and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.inner = nn.Conv2d(width, 9, 1)
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.outer = nn.Conv2d(9, width, 1)
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)
        self.gate = nn.Conv2d(width, 1, 1)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(self.depthwise(self.inner(x).relu()).relu())
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x * self.gate(x).sigmoid())


def emptied(graph: ChannelGraph, limits: Limits, **options: Any) -> dict[str, int]:
    """Return the widths after all that limits allow has been removed."""
    scores = np.arange(float(graph.num_units))
    options.setdefault("dense", DenseSizes.of(graph))
    plan = select(graph, scores, {"macs": 1e-9}, limits=limits, **options)
    return {name.removesuffix(".weight"): width for name, width in graph.widths(plan).items()}


def test_by_default_four_channels_stay_or_a_third_of_a_narrow_layer():
    graph = trace(Residual(), IMAGE)
    assert emptied(graph, Limits(layers=1.0)) == {
        "stem": 4,
        "inner": 3,
        "depthwise": 3,
        "outer": 4,
        "squeeze": 1,
        "excite": 4,
        "gate": 1,
        "head": 5,
    }


def test_a_floor_of_one_is_none():
    widths = emptied(trace(Residual(), IMAGE), Limits(layers=1.0, min_channels=1))
    assert widths == dict.fromkeys(widths, 1) | {"head": 5}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"inner": {"min_channels": 2}},
            {"stem": 4, "inner": 3, "depthwise": 3},
        ),  # coupled: the higher floor
        ({"inner": {"min_channels": 1}, "depthwise": {"min_channels": 2}}, {"stem": 4, "inner": 2}),
        ({"outer": {"min_channels": 5}}, {"stem": 5, "excite": 5, "inner": 3}),
        ({"inner": {"min_channels": 8}}, {"inner": 8}),  # said of the layer: the number holds, not a third
        ({"inner": {"min_channels": 12}}, {"inner": 9}),  # narrower than that: keeps all
        ({"stem": 0.5}, {"stem": 8}),
        ({"stem": {"share": 0.5, "of": "channels", "min_channels": 6}}, {"stem": 8}),
        ({"stem": {"share": 0.9, "of": "channels", "min_channels": 5}}, {"stem": 5}),
        ({nn.Conv2d: {"min_channels": 3}}, {"stem": 3, "inner": 3, "squeeze": 2}),
    ],
)
def test_overrides_set_the_floor_of_single_layers_beside_shares(overrides, expected):
    widths = emptied(trace(Residual(), IMAGE), Limits(layers=1.0, of="channels", overrides=overrides))
    assert {name: widths[name] for name in expected} == expected


class Heads(nn.Module):
    """Attention of four heads with eight channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 24)
        self.query, self.key, self.value = (nn.Linear(24, 32) for _ in range(3))
        self.out = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("floor", "in_groups", "in_heads"), [(1, 4, 8), (4, 4, 8), (7, 8, 8), (9, 8, 16)])
def test_heads_and_groups_count_their_channels(floor, in_groups, in_heads):
    """A unit is one channel of each of the four groups, or a whole head of eight channels."""
    grouped = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, groups=4), nn.Conv2d(24, 2, 1))
    limits = Limits(layers=1.0, min_channels=floor)
    assert emptied(trace(grouped, IMAGE), limits)["1"] == in_groups
    assert emptied(trace(Heads(), torch.zeros(1, 5, 3)), limits)["value"] == in_heads


def test_the_floor_refers_to_the_dense_network_after_a_cut():
    """A third of the present width would fall with every cut."""
    net = Residual()
    graph = trace(net, IMAGE)
    dense = DenseSizes.of(graph)
    prune_(net, graph, graph.layers["inner.weight"][:5])
    smaller = trace(net, IMAGE)
    assert smaller.widths()["inner.weight"] == 4
    assert emptied(smaller, Limits(layers=1.0), dense=dense)["inner"] == 3
    prune_(net, smaller, smaller.layers["inner.weight"][:2])
    # Below the floor already, as in a run of an older version: the layer keeps what it has.
    assert emptied(trace(net, IMAGE), Limits(layers=1.0), dense=dense)["inner"] == 2


def test_multiples_are_kept_above_the_floor():
    widths = emptied(trace(Residual(32), IMAGE), Limits(layers=1.0, min_channels=9), channel_multiple=8)
    assert widths["stem"] == 16
    assert emptied(trace(Residual(32), IMAGE), Limits(layers=1.0), channel_multiple=8)["stem"] == 8


def test_a_budget_that_only_the_floor_forbids_is_refused_with_its_name():
    graph = trace(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)), IMAGE)
    limits = Limits(layers=1.0)
    with pytest.raises(
        ValueError, match=r"without limits 0\.\d+\).*limits min_channels=4, which closes 0, 1"
    ):
        check_budget(graph, {"macs": 0.1}, limits=limits)
    check_budget(graph, {"macs": 0.1}, limits=Limits(layers=1.0, min_channels=1))
    with pytest.raises(
        ValueError, match=r"limits overrides\['\*'\]=\{'min_channels': 12\}, which closes 0, 1"
    ):
        check_budget(graph, {"macs": 0.3}, limits=Limits(layers=1.0, overrides={"*": {"min_channels": 12}}))


def test_a_plan_that_ends_above_the_budget_says_which_layers_keep_channels():
    graph = trace(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)), IMAGE)
    plan = select(
        graph, np.arange(18.0), {"macs": 0.01}, limits=Limits(layers=1.0), dense=DenseSizes.of(graph)
    )
    assert plan.closed == {"0": "at least 4 of its channels stay"}
    assert "no candidate left (0: at least 4 of its channels stay)" in str(plan)


class Block(nn.Module):
    """Two convolutions; the second is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).relu())


def test_a_floor_of_a_block_is_refused_and_that_of_its_layers_is_not():
    net = nn.Sequential(Block())
    graph = trace(net, IMAGE)
    with pytest.raises(ValueError, match=r"min_channels concerns layers.*'0' matches no layer.*did you mean"):
        emptied(graph, Limits(overrides={"0": {"min_channels": 6}}))
    assert emptied(graph, Limits(layers=1.0, overrides={"0.*": {"min_channels": 6}}))["0.conv"] == 6
    assert emptied(graph, Limits(layers=1.0, overrides={"0.*": {"min_channels": 3}}))["0.conv"] == 3


def test_a_glob_with_a_floor_alone_gives_blocks_no_limit():
    net = nn.Sequential(nn.Sequential(Block()))
    limits = Limits(layers=1.0, blocks=0.5, overrides={"0.*": {"min_channels": 2}})
    assert limits.of_block("0.0") == Limits(blocks=0.5).of_block("0.0")
    assert (
        emptied(trace(net, IMAGE), Limits(overrides={"*": {"share": 1.0, "min_channels": 2}}))["0.0.conv"]
        == 2
    )


class Branches(nn.Module):
    """Branches of one convolution each, which may vanish as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)) for _ in range(2)
        )
        self.head = nn.Conv2d(12, 2, 1)

    @property
    def optional_parts(self) -> list[nn.Module]:
        return list(self.branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + sum(branch(x) for branch in self.branches))


def test_branches_that_may_vanish_as_a_whole_have_no_floor():
    graph = trace(Branches(), IMAGE)
    plan = select(
        graph,
        np.where(np.isin(np.arange(graph.num_units), graph.layers["branches.0.0.weight"]), 0.0, np.inf),
        {"macs": 1e-9},
        limits=Limits(layers=1.0),
        dense=DenseSizes.of(graph),
    )
    assert graph.widths(plan)["branches.0.0.weight"] == 0


def test_slimming_and_alignment_respect_the_floor():
    net = nn.Sequential(nn.Conv2d(3, 13, 1), nn.BatchNorm2d(13), nn.Conv2d(13, 2, 1))
    graph = trace(net, IMAGE)
    dense, sizes = DenseSizes.of(graph), np.zeros(graph.num_units)
    plan = SlimmingPolicy({}, limits=Limits(1.0)).plan(graph, sizes, dense)
    assert graph.widths(plan)["0.weight"] == 4
    scores, whole = np.arange(float(graph.num_units)), Limits(1.0, overrides={"0": {"min_channels": 9}})
    assert surplus_units(graph, scores, ["0.weight"], 8, Limits(1.0), dense) == [0, 1, 2, 3, 4]
    assert surplus_units(graph, scores, ["0.weight"], 8, whole, dense) == []
