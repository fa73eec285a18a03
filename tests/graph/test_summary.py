"""Sizes of a network layer by layer: exact sums, what is pinned and coupled, and pages that a person can read."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import L2, ChannelGraph, LayerCost, Plan, Term, prune_, select, trace
from lightning_prune.graph.coupling import coupled_layers
from tests.support.small_unet import SmallUNet


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return trace(SmallUNet(), torch.zeros(1, 1, 32, 32))


@pytest.fixture(scope="module")
def plan(graph: ChannelGraph) -> Plan:
    net = SmallUNet()
    torch.manual_seed(0)
    return select(graph, L2()(graph, net), {"macs": 0.5})


def test_costs_of_layers_and_others_add_up_to_the_network(graph: ChannelGraph, plan: Plan) -> None:
    energy = LayerCost(lambda layer, channels_in, channels_out: channels_in + channels_out)
    graph = graph.with_resources({"energy": energy})
    summary = graph.summary(plan.remove)
    for resource in ("macs", "params", "energy"):
        before = sum(layer.costs[resource].before for layer in summary.layers)
        after = sum(layer.costs[resource].after for layer in summary.layers)
        assert before + summary.others[resource].before == graph.cost(resource)
        assert after + summary.others[resource].after == graph.cost(resource, plan.remove)
    assert summary.others["params"].before == 2 * (8 + 12 + 16)  # weights and biases of the norms


def test_a_summary_tells_what_the_cut_then_does() -> None:
    torch.manual_seed(1)
    net = SmallUNet()
    graph = trace(net, torch.zeros(1, 1, 32, 32))
    plan = select(graph, L2()(graph, net), {"macs": 0.5})
    summary = plan.summary()
    prune_(net, graph, plan)
    convs = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert {layer.name: layer.channels.after for layer in summary.layers} == {
        name: conv.out_channels for name, conv in convs.items()
    }
    for layer in summary.layers:
        assert layer.costs["params"].after == sum(p.numel() for p in convs[layer.name].parameters())
        assert layer.kind == "Conv2d"


def test_pins_and_couplings_are_named(graph: ChannelGraph) -> None:
    summary = graph.summary()
    assert [group.layers for group in summary.groups] == [
        ("down.0", "body.0"),
        ("down.1", "body.1"),
        ("down.2", "body.2"),
    ]
    by_name = {layer.name: layer for layer in summary.layers}
    assert by_name["down.1"].group == by_name["body.1"].group == 1
    assert by_name["head"].group is None
    assert by_name["head"].pinned == {"is the network's output": 3}
    text = str(summary)
    assert "B 12 channels shared by down.1, body.1" in text
    assert "¹ 3 pinned: is the network's output - head" in text


def test_groups_are_joined_through_others() -> None:
    units = {"a": np.array([0, 1]), "b": np.array([2, 3]), "c": np.array([1, 2]), "d": np.array([4])}
    assert [(group.layers, group.units) for group in coupled_layers(units)] == [
        (("a", "b", "c"), 4),
        (("d",), 1),
    ]
    assert coupled_layers({}) == []


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut_off(plan: Plan, width: int) -> None:
    text = plan.summary().text(width)
    assert max(map(len, text.splitlines())) <= width
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for layer in plan.summary().layers:
        assert f"{layer.channels.after}" in rows[layer.name].split()
        assert "…" not in rows[layer.name]
    assert ("parameters" in text.splitlines()[3]) == (width >= 80)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_many_resources_leave_room_for_names(graph: ChannelGraph, plan: Plan, width: int) -> None:
    cost = LayerCost(lambda layer, channels_in, channels_out: channels_in * channels_out)
    graph = graph.with_resources({"latency": cost, "energy": cost, "memory": cost})
    lines = graph.summary(plan.remove).text(width).splitlines()
    assert max(map(len, lines)) <= width
    table = [line for line in lines if line.startswith(("down", "body", "up", "head"))]
    assert all("…" not in line and line.split()[0] in graph.layer_tree.layers for line in table)
    assert ("latency" in lines[6]) == (width >= 80)


def test_long_names_lose_their_beginning() -> None:
    inner: nn.Module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    for name in ("a_block_with_a_very_long_name", "within_another_long_name", "and_one_more"):
        inner = _wrapped(name, inner)
    text = trace(inner, torch.zeros(1, 1, 8, 8)).summary([0]).text(60)
    assert max(map(len, text.splitlines())) <= 60
    assert any(line.startswith("…") and "long_name.0 " in line for line in text.splitlines())


def _wrapped(name: str, inner: nn.Module) -> nn.Module:
    outer = nn.Sequential()
    outer.add_module(name, inner)
    return outer


def test_a_plan_shows_its_ending_its_budget_and_full_layers(graph: ChannelGraph) -> None:
    plan = select(graph, torch.arange(graph.num_units, dtype=torch.float), {"macs": 0.3})
    text = str(plan.summary())
    assert "(budget " in text.splitlines()[0]
    assert "▪ loses no more: " in text
    assert plan.ending in text
    assert repr(plan) == f"Plan({plan})"


def test_a_plan_made_by_hand_has_no_summary() -> None:
    plan = Plan(np.array([0]), {}, "budget")
    with pytest.raises(ValueError, match="made by hand"):
        plan.summary()
    assert "1 unit " in plan._repr_html_()


def test_plans_keep_no_trace_in_memory(plan: Plan, graph: ChannelGraph) -> None:
    assert plan.graph is not None
    assert plan.graph.evidence is None
    assert graph.evidence is not None


def test_a_plan_can_be_sent_to_another_process_whatever_its_resources_are_made_of(
    graph: ChannelGraph,
) -> None:
    layer = next(iter(graph.layers.values()))
    milliseconds = replace(
        graph, terms={**graph.terms, "latency": [Term("0", 1, (layer,), lambda n: 3.0 * n)]}
    )
    plan = select(milliseconds, np.arange(graph.num_units, dtype=float), {"latency": 0.9})
    copied = pickle.loads(pickle.dumps(plan))
    assert list(copied) == list(plan)
    assert copied == replace(plan, remove=copied.remove)
    assert plan.summary().layers


def test_json_and_html_hold_every_layer(plan: Plan, tmp_path: Path) -> None:
    summary = plan.summary()
    for ending in ("json", "html", "txt", "svg"):
        summary.save(tmp_path / f"plan.{ending}")
    plain = json.loads((tmp_path / "plan.json").read_text())
    assert [layer["channels"]["after"] for layer in plain["layers"]] == [
        layer.channels.after for layer in summary.layers
    ]
    assert plain["totals"]["macs"]["after"] == plan.costs["macs"].after
    assert all(row.name in (tmp_path / "plan.svg").read_text() for row in summary.layers)
    page = (tmp_path / "plan.html").read_text()
    cells = Cells(page).texts
    assert {layer.name for layer in summary.layers} <= set(cells)
    assert "http" not in page  # nothing to load
    assert (tmp_path / "plan.txt").read_text() == str(summary)


class Cells(HTMLParser):
    """The texts of the cells of a page; raises if a tag is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.texts.append(data)


def test_names_are_escaped_in_html() -> None:
    units = np.arange(2)
    made = ChannelGraph(
        2,
        {},
        {"<b>&.weight": units},
        {"<b>&.weight": 0},
        {1: "<i>"},
        {"macs": [Term("<b>&.weight", 1, (units,))]},
    )
    page = made._repr_html_()
    assert "<b>&." not in page
    assert "&lt;b&gt;&amp;" in page
    assert "&lt;i&gt;" in page


def test_representations_are_short(graph: ChannelGraph) -> None:
    assert repr(graph) == (
        f"ChannelGraph({len(graph.layers)} layers; {graph.num_units} units, {len(graph.prunable)} prunable; "
        "937k macs, 11.5k params)"
    )
    assert "<table>" in graph._repr_html_()


def test_weights_of_one_module_have_rows_of_their_own() -> None:
    net = nn.LSTM(4, 6, batch_first=True)
    summary = trace(net, torch.zeros(1, 5, 4)).summary()
    total = sum(layer.costs["params"].before for layer in summary.layers) + summary.others["params"].before
    assert total == sum(p.numel() for p in net.parameters())
    assert len({layer.name for layer in summary.layers}) == len(summary.layers)
