"""Tests that a latency table is refused for a network with other layers, and for a file that was changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.robustness.fuzz.files import table
from lightning_prune import LatencyError, prune_, trace
from lightning_prune.latency.backends import EXECUTIONS
from lightning_prune.latency.network_check import check_network, dense_layers
from lightning_prune.latency.store import Measurements, load, save
from lightning_prune.serialization.integrity import Fingerprint

X = torch.zeros(1, 3, 8, 8)


class Wrapped(nn.Module):
    """Holds a network, and a weight that takes no part in the forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss_weight = net, nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def build(width: int = 8, classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 1)
    ).eval()


def layers_of(net: nn.Module, x: torch.Tensor = X) -> Fingerprint:
    graph = trace(net, x)
    return dense_layers(EXECUTIONS["eager"].pieces(graph), graph)


@pytest.fixture
def measured() -> Measurements:
    return replace(table(), dense=layers_of(build()))


def test_the_network_itself_fits_also_pruned_and_within_another_module(measured: Measurements) -> None:
    assert measured.dense["3.weight"] == ["float32", [4, 8, 1, 1]]
    net = build()
    check_network(measured, layers_of(net))
    check_network(measured, layers_of(Wrapped(net)))
    graph = trace(net, X)
    prune_(net, graph, graph.layers["0.weight"][:3])
    check_network(measured, layers_of(net))
    check_network(measured, layers_of(Wrapped(net)))
    check_network(replace(measured, dense={}), layers_of(build(99)))


def test_another_network_is_refused_with_what_differs(measured: Measurements) -> None:
    others = {
        r"'0.weight' is float32 \[8, 3, 3, 3\] in the file, here float32 \[9, 3, 3, 3\]": layers_of(build(9)),
        "here float64": layers_of(build().double(), X.double()),
        "only here: '4.bias', '4.weight'": layers_of(build().append(nn.Conv2d(4, 4, 1))),
        "only in the file: '3.bias', '3.weight'": layers_of(build()[:3]),
    }
    for message, here in others.items():
        with pytest.raises(LatencyError, match=f"another network: .*{message}.* verify=False"):
            check_network(measured, here)


def test_a_table_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save(table(), path)
    assert load(path) == table()
    content = json.loads(path.read_text())
    content["entries"]["aten::relu"]["ns"][0] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(LatencyError, match=r"table.json: it is damaged or was changed.*verify=False"):
        load(path)
    assert load(path, verify=False).entries["aten::relu"].lookup.values == (2.0, 9.0)
    del content["checksum"], content["dense"]
    path.write_text(json.dumps(content))
    assert load(path).dense == {}
