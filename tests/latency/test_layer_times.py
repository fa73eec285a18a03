"""The latency of each layer of two networks: every call counts, what vanished takes no time, and time is limited."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune import PruningRecord, prune_, trace
from lightning_prune.graph.summary import Change
from lightning_prune.latency.layer_times import NotMeasured, layer_times
from lightning_prune.latency.profiler import BackendSettings, TimedPiece
from lightning_prune.reporting.layers import layers_of, load_layers, save_layers

CPU = BackendSettings("eager", torch.device("cpu"), 1)


class Residual(nn.Module):
    """A residual block; its first convolution is called twice if ``twice``."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.second, self.twice = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            twice,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        return x + self.second(self.first(y) if self.twice else y)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), Residual(True), Residual(False), nn.Conv2d(8, 2, 1))


X = torch.zeros(1, 1, 12, 12)


@pytest.fixture
def counted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the number of operations of an operator for its nanoseconds."""

    def measure(point: TimedPiece, *_: object) -> None:
        point.times.append(float(point.piece.volume(point.counts)))

    monkeypatch.setattr(TimedPiece, "measure", measure)


def cut_net() -> tuple[nn.Module, PruningRecord]:
    """Return a network without its last block and without two channels of the others, and the record of the cut."""
    small = net()
    graph = trace(small, X)
    return small, prune_(small, graph, graph.layers["0.weight"][:2].tolist(), blocks=["2"])


@pytest.mark.usefixtures("counted_time")
def test_each_call_of_a_layer_counts_and_vanished_layers_take_no_time(tmp_path: Path) -> None:
    small, record = cut_net()
    layers = layers_of(net(), record, X, CPU)
    named = {layer.name: layer for layer in layers.layers}
    dense, pruned = (layer_times([trace(each, X)], CPU, 60).networks[0] for each in (net(), small))
    assert [name for name, _ in dense].count("1.first.weight") == 2
    for name, layer in named.items():
        before, after = (
            sum(ns for each, ns in times if each == f"{name}.weight") for times in (dense, pruned)
        )
        assert layer.costs["latency"] == Change(before, after), name
        assert before > 0
    assert named["2.first"].costs["latency"].after == named["2.second"].costs["latency"].after == 0
    assert named["1.first"].costs["latency"].after > 0
    assert layers.totals["latency"] == Change(*(sum(ns for _, ns in times) for times in (dense, pruned)))
    save_layers(layers, tmp_path)
    assert load_layers(tmp_path) == layers
    assert layers.measured == (
        "Each operator alone, in PyTorch, for one input of 1 x 1 x 12 x 12 (float32) on the CPU with 1 thread; the "
        "operators of both networks take turns."
    )


def test_the_layers_of_a_network_without_some_blocks_have_its_true_sizes() -> None:
    """Before, a block that had vanished was shown as if it were there."""
    small, record = cut_net()
    layers = layers_of(net(), record, X)
    assert layers.totals["macs"].after == trace(small, X).cost("macs")
    assert layers.totals["params"].after == sum(parameter.numel() for parameter in small.parameters())
    assert {layer.name: layer.channels.after for layer in layers.layers}["2.first"] == 0


def test_real_times_are_those_of_the_larger_operator_and_the_time_is_limited() -> None:
    wide = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 1, 1))
    times = dict(layer_times([trace(wide, torch.zeros(1, 16, 64, 64))], CPU, 60).networks[0])
    assert times["0.weight"] > times["1.weight"] > 0
    with pytest.raises(NotMeasured, match="it takes more than 0 s"):
        layer_times([trace(wide, torch.zeros(1, 16, 64, 64))], CPU, seconds=0)


def test_the_reason_is_kept_where_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.reporting.layers.LONGEST", 0.0)
    layers = layers_of(net(), PruningRecord(), X, CPU)
    assert layers.measured == "The latency of each layer was not measured: it takes more than 0 s."
    assert "latency" not in layers.totals


@pytest.mark.usefixtures("counted_time")
def test_operators_that_cannot_be_run_alone_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    make_call = TimedPiece.measure

    def measure(point: TimedPiece, *_: object) -> None:
        if point.piece.is_contraction:
            make_call(point, *_)
        else:
            point.error = "no"

    monkeypatch.setattr(TimedPiece, "measure", measure)
    layers = layers_of(net(), PruningRecord(), X, CPU)
    assert "Without 8 operators that cannot be run alone." in layers.measured
    assert layers.others["latency"] == Change(
        0, 0
    )  # an addition and an activation of two blocks of two networks
