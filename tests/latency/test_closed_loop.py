"""Closed loop: plans are measured and corrected until the measured latency is that of the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import LatencyTable, Limits, PruningPolicy, one_shot, trace
from lightning_prune.criteria import L2
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency import table as latency_table
from lightning_prune.latency.calibration import Correction, measured_ratio
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.surgery.prune import SurgeryError

IMAGE = torch.zeros(1, 3, 32, 32)
FREE = Limits(1.0, min_channels=1)


class Conv(nn.Sequential):
    """Wide convolutions, so that nearly all of the time depends on the channels."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 4, 3))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Conv().eval()


@pytest.fixture(scope="module")
def built(net: nn.Module) -> LatencyTable:
    table = LatencyTable(threads=1, cuts=0)
    table.build(trace(net, IMAGE))
    return table


def table_with(built: LatencyTable, turns: int) -> LatencyTable:
    """Return a table with turns; its tolerance is wider than the steps of the kernels of :class:`Conv`."""
    table = LatencyTable(threads=1, cuts=0, turns=turns, tolerance=0.1)
    table.measured = built.measured
    return table


def truth(predicted: float) -> float:
    """Return the real share of a network: fewer channels save less time than the table says."""
    return predicted**0.5


@pytest.fixture
def measurements(built: LatencyTable, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace measurements by :func:`truth` of what the table predicted before any correction; list their results."""
    results: list[float] = []

    def ratio(graph: ChannelGraph, settings: Any, remove: list[int], blocks: Any) -> float:
        first = graph.with_resources({"latency": built})
        results.append(truth(first.cost("latency", remove) / first.cost("latency")))
        return results[-1]

    monkeypatch.setattr(latency_table, "measured_ratio", ratio)
    return results


def plan(net: nn.Module, table: LatencyTable, share: float = 0.5, **options: Any) -> Any:
    policy = PruningPolicy({"latency": share}, limits=FREE, resources={"latency": table}, **options)
    graph = policy.trace(net, ((IMAGE,), {}))
    return policy.plan(graph, L2()(graph, net), DenseSizes.of(graph)), graph


@pytest.mark.parametrize("selection", ["greedy", "optimal"])
def test_turns_end_where_the_measured_latency_is_that_of_the_budget(
    net: nn.Module, built: LatencyTable, measurements: list[float], selection: Any
) -> None:
    result, _ = plan(net, table_with(built, turns=6), selection=selection)
    assert measurements[0] > 0.65  # by the predictions alone the budget would be missed
    assert measurements[-1] == pytest.approx(0.5, rel=0.101)
    assert result.reached
    assert len(measurements) <= 6


def test_predictions_of_the_present_network_stay_and_the_plan_is_predicted_as_it_was_measured(
    net: nn.Module, built: LatencyTable, measurements: list[float]
) -> None:
    table = table_with(built, turns=6)
    result, graph = plan(net, table)
    corrected = graph.with_resources({"latency": table})
    assert corrected.cost("latency") == pytest.approx(graph.cost("latency"), rel=1e-3)
    predicted = corrected.cost("latency", result.remove) / corrected.cost("latency")
    assert predicted == pytest.approx(measurements[-1], rel=0.2)
    assert predicted <= 0.5


def test_without_turns_nothing_is_measured(
    net: nn.Module, built: LatencyTable, measurements: list[float]
) -> None:
    table = table_with(built, turns=0)
    result, _ = plan(net, table)
    assert result.reached
    assert measurements == []
    assert table.measured is built.measured


def test_too_few_turns_take_the_nearest_plan_and_say_by_how_much_it_misses(
    net: nn.Module, built: LatencyTable, measurements: list[float]
) -> None:
    with pytest.warns(
        UserWarning, match=r"measured latency of the plan is [\d.]+% above its budget after 1 turns"
    ):
        plan(net, table_with(built, turns=1))
    assert len(measurements) == 1


def test_a_budget_of_another_resource_that_binds_ends_the_turns(
    net: nn.Module, built: LatencyTable, measurements: list[float]
) -> None:
    table = table_with(built, turns=5)
    policy = PruningPolicy({"latency": 0.9, "macs": 0.1}, limits=FREE, resources={"latency": table})
    graph = policy.trace(net, ((IMAGE,), {}))
    result = policy.plan(graph, L2()(graph, net), DenseSizes.of(graph))
    assert result.reached
    assert len(measurements) == 1


def test_a_step_that_does_not_end_at_the_budget_is_not_measured(
    net: nn.Module, built: LatencyTable, measurements: list[float]
) -> None:
    result, _ = plan(net, table_with(built, turns=5), amount={"latency": 0.1})
    assert result.stopped == "amount"
    assert measurements == []


def test_a_cut_that_surgery_refuses_is_planned_without_a_measurement(
    net: nn.Module, built: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> float:
        raise SurgeryError("refused")

    monkeypatch.setattr(latency_table, "measured_ratio", refuse)
    assert plan(net, table_with(built, turns=2))[0].reached


def test_one_shot_plans_by_measurement(built: LatencyTable, measurements: list[float]) -> None:
    torch.manual_seed(0)
    net = Conv().eval()
    resources = {"latency": table_with(built, turns=6)}
    one_shot(net, IMAGE, PruningPolicy({"latency": 0.5}, limits=FREE, resources=resources))
    graph = trace(net, IMAGE).with_resources({"latency": built})
    dense = trace(Conv(), IMAGE).with_resources({"latency": built})
    assert truth(graph.cost("latency") / dense.cost("latency")) == pytest.approx(0.5, rel=0.101)


def test_the_measured_ratio_is_that_of_two_networks(net: nn.Module, built: LatencyTable) -> None:
    graph = trace(net, IMAGE)
    most = [unit for layer in ("0.weight", "2.weight") for unit in graph.layers[layer][4:].tolist()]
    assert 0 < measured_ratio(graph, built.place, most) < 0.6  # 4 of 96 channels are left
    assert net[0].out_channels == 96  # copies were cut


def test_a_stretched_correction_keeps_the_whole_network() -> None:
    before = Correction(constant=10.0, even=1.0, odd=2.0, cold=0.5)
    after = before.stretched(whole=100.0, factor=0.5)
    sums = torch.tensor([[60.0, 10.0, 20.0], [10.0, 5.0, 20.0]], dtype=torch.float64).numpy()
    assert before.network_time(sums).tolist() == [100.0, 40.0]
    assert after.network_time(sums).tolist() == pytest.approx([100.0, 70.0])


@pytest.mark.parametrize("options", [{"turns": -1}, {"tolerance": 0.0}, {"tolerance": 1.0}])
def test_turns_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need turns >= 0"):
        LatencyTable(**options)
