"""Latency as a resource: measured, predicted, saved and refused. No test checks how long anything takes."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, LatencyError, LatencyTable, prune_, select, trace
from lightning_prune.cli.main import main
from lightning_prune.criteria import L2, CostAware
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency import table as latency_table
from lightning_prune.latency.calibration import random_units
from lightning_prune.latency.operators import operators
from lightning_prune.latency.store import Measurements, load
from tests.support.latency_networks import IMAGE, Mixed, steadily_rising, table


def build(graph: ChannelGraph) -> Measurements:
    return table().build(graph)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> ChannelGraph:
    return trace(net, IMAGE)


@pytest.fixture(scope="module")
def measured(graph: ChannelGraph) -> Measurements:
    return build(graph)


@pytest.fixture
def saved(measured: Measurements, tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(measured.to_dict()))
    return path


def test_identical_operators_are_measured_once() -> None:
    def stack(layers: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(layers)), nn.Conv2d(8, 2, 1)
        )

    few, many = build(trace(stack(2), IMAGE)), build(trace(stack(6), IMAGE))
    assert list(few.entries) == list(many.entries)
    assert few.info["points"] == many.info["points"]


def test_the_cost_after_a_cut_equals_the_predicted_cost(
    net: nn.Module, graph: ChannelGraph, measured: Measurements, tmp_path: Path
) -> None:
    """Before and after surgery the same operators are looked up at the same channel counts."""
    saved = tmp_path / "rising.json"
    saved.write_text(json.dumps(steadily_rising(measured).to_dict()))
    with_time = graph.with_resources({"latency": table(path=saved)})
    remove = random_units(graph, np.random.default_rng(5))
    small = copy.deepcopy(net)
    prune_(small, trace(small, IMAGE), remove)
    after = trace(small, IMAGE).with_resources({"latency": table(path=saved)})
    assert after.cost("latency") == with_time.cost("latency", remove)
    assert after.cost("latency") < with_time.cost("latency")


def test_costs_are_sums_over_the_table(graph: ChannelGraph, measured: Measurements, tmp_path: Path) -> None:
    """Sum the corrected times of all operators at their own channel counts."""
    correction = replace(measured.correction, constant=5000.0, even=2.0, odd=3.0, cold=4.0)
    path = tmp_path / "corrected.json"
    path.write_text(json.dumps(replace(measured, correction=correction).to_dict()))
    total = 5000
    for operator in operators(graph):
        factor = 2.0 if all(count % 8 == 0 for count in operator.dense_counts) else 3.0
        curve = load(path).entries[operator.signature]
        cold = 4.0 * sum(
            math.prod(operator.size(s, operator.dense_counts) for s in slot.sizes)
            for slot in operator.slots
            if slot.is_parameter
        )
        total += round(factor * curve.time(operator, *operator.dense_counts) + cold)
    assert graph.with_resources({"latency": table(path=path)}).cost("latency") == total


def test_a_table_is_refitted_to_the_intended_cut(graph: ChannelGraph) -> None:
    latency = table(cuts=1)
    with pytest.raises(ValueError, match="nothing is measured yet"):
        latency.refit(graph, [])
    before = latency.build(graph)
    correction = latency.refit(graph, random_units(graph, np.random.default_rng(4)))
    assert correction.cuts == 2
    assert latency.measured == replace(before, correction=correction)


def test_whole_networks_are_measured_on_copies_of_the_traced_one(net: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    correction = table(cuts=3).build(trace(net, IMAGE)).correction
    assert correction.cuts == 3
    assert correction.constant + correction.even + correction.odd > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_table_is_built_once_and_reused(graph: ChannelGraph, tmp_path: Path) -> None:
    first = graph.with_resources({"latency": table(path=tmp_path / "folder")})
    (file,) = (tmp_path / "folder").iterdir()
    written = file.stat().st_mtime_ns
    again = graph.with_resources({"latency": table(path=tmp_path / "folder")})
    assert first.cost("latency") == again.cost("latency")
    assert file.stat().st_mtime_ns == written


def test_a_folder_may_hold_tables_of_an_older_version(
    graph: ChannelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such files are ignored: a user need not delete anything when the format changes."""
    current = table(path=tmp_path).file(graph)
    monkeypatch.setattr(latency_table, "VERSION", 1)
    assert table(path=tmp_path).file(graph) != current


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda: Another"}, "device 'cuda: Another', here it is 'cpu: "),
        ({"threads": 7}, "threads 7, here it is 1"),
        ({"versions": {"torch": "1.0"}}, "versions {'torch': '1.0'}, here it is "),
    ],
)
def test_a_table_measured_under_other_settings_is_refused(
    graph: ChannelGraph, saved: Path, changes: dict[str, Any], message: str
) -> None:
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **changes}))
    with pytest.raises(LatencyError, match="build a table of your own") as error:
        graph.with_resources({"latency": table(path=saved)})
    assert message in str(error.value)
    assert graph.with_resources({"latency": table(path=saved, elsewhere=True)}).cost("latency") > 0


def test_a_table_of_another_network_is_refused(net: nn.Module, saved: Path) -> None:
    others = {
        "for inputs": trace(net, torch.zeros(1, 3, 16, 16)),
        "it lacks 3 of 3 operators, aten::convolution": trace(
            nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE
        ),
        "16 channels, but at most 8 were measured": trace(Mixed(16), IMAGE),
    }
    for message, graph in others.items():
        with pytest.raises(LatencyError, match=message):
            graph.with_resources({"latency": table(path=saved)})


def test_a_grouped_convolution_with_one_channel_left_per_group(net: nn.Module, saved: Path) -> None:
    """It is a depthwise one then, which the table does not contain; training must continue."""
    small = copy.deepcopy(net)
    graph = trace(small, IMAGE)
    units = np.unique(graph.layers["stem.0.weight"])
    prune_(small, graph, units[1:])
    with pytest.warns(UserWarning, match=r"lacks 1 of 12 operators, .*grouped\.weight'; their"):
        after = trace(small, IMAGE).with_resources({"latency": table(path=saved)})
    assert after.cost("latency") > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a latency table"),
        ('{"version": 1}', "not a latency table of version 2"),
        ('{"version": 2}', "damaged latency table"),
        ("entries", "damaged latency table"),
    ],
)
def test_a_damaged_table_is_refused(graph: ChannelGraph, saved: Path, text: str, message: str) -> None:
    if text == "entries":
        content = json.loads(saved.read_text())
        next(iter(content["entries"].values()))["ns"].pop()
        text = json.dumps(content)
    saved.write_text(text)
    with pytest.raises(LatencyError, match=message):
        graph.with_resources({"latency": table(path=saved)})


@pytest.mark.parametrize(
    "arguments", [{"execution": "fast"}, {"cuts": -1}, {"threads": 0}, {"cuts": 1, "execution": "compiled"}]
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LatencyTable(**arguments)


def test_a_graph_made_by_hand_has_no_operators() -> None:
    with pytest.raises(ValueError, match="made by trace"):
        ChannelGraph(0, {}, {}, {}, {}, {}).with_resources({"latency": table()})


def test_budgets_and_criteria_in_latency(net: nn.Module, graph: ChannelGraph, measured: Measurements) -> None:
    latency = table()
    latency.measured = steadily_rising(measured)
    timed = graph.with_resources({"latency": latency})
    plan = select(timed, L2()(timed, net, {}), {"latency": 0.85})
    assert plan.reached
    assert (
        timed.cost("latency", plan.remove)
        <= 0.85 * timed.cost("latency")
        < timed.cost("latency", plan.remove[:-1])
    )
    scores = CostAware(L2(), resources={"latency": 1.0})(timed, net, {})
    assert np.isfinite(scores[timed.prunable]).all()
    with pytest.raises(ValueError, match=r"latency=0.01 cannot be met: .* keep at least"):
        select(timed, L2()(timed, net, {}), {"latency": 0.01})


class Trained(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Mixed()
        self.example_input_array = IMAGE

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:the latency table does not fit exactly")
def test_the_callback_prunes_to_a_latency(measured: Measurements, tmp_path: Path) -> None:
    latency = table()
    latency.measured = steadily_rising(measured)
    pruning = FilterPruningCallback(
        {"latency": 0.7}, resources={"latency": latency}, amount={"latency": 0.2}, start_epoch=0
    )
    data = DataLoader(TensorDataset(torch.rand(4, 3, 12, 12)), 2)
    trainer = L.Trainer(
        max_epochs=3, callbacks=[pruning], default_root_dir=tmp_path, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Trained(), data)
    assert pruning.history[-1].share["latency"] <= 0.7


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    overrides = ["net=unet_small", "data.size=32"]
    monkeypatch.setattr(
        "sys.argv",
        ["lightning-prune", "latency", str(tmp_path / "t.json"), *overrides, "--cuts=0", "--threads=1"],
    )
    main()
    assert "points in" in capsys.readouterr().out
    assert load(tmp_path / "t.json").inputs[0][0]["shape"][-1] == 32
    monkeypatch.setattr("sys.argv", ["lightning-prune", "latency", "t.json", "net=nothing"])
    with pytest.raises(SystemExit, match=r"latency: .*nothing"):
        main()
