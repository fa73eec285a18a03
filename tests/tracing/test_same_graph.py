"""The same network has the same graph: traced twice, before and after a forward, and in another process.

A resumed run traces its network anew, and its record must mean the same units.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given

from lightning_prune import ChannelGraph
from tests.support.random_cuts import description, traced
from tests.support.random_nets import BLOCKS, N, Net, nets

CHILD = """
import json, sys
from tests.support.random_cuts import traced
from tests.tracing.test_same_graph import as_json, evaluated
specs = json.load(sys.stdin)
json.dump([as_json(traced(net, net.build())) for net in map(evaluated, specs)], sys.stdout)
"""
MINIMUM = 50


def evaluated(spec: str) -> Net:
    """Return the network of a ``repr``."""
    net = eval(spec, {"Net": Net, "N": N})
    assert isinstance(net, Net)
    return net


def as_json(graph: ChannelGraph) -> Any:
    """Return the description of a graph as it comes back from JSON."""
    return json.loads(json.dumps(description(graph)))


def _draw(kind: str) -> list[Net]:
    drawn: list[Net] = []

    @hypothesis.settings(
        max_examples=2, derandomize=True, database=None, phases=(Phase.generate,), deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(net=nets(depth=1, only=kind))
    def collect(net: Net) -> None:
        drawn.append(net)

    collect()
    return drawn


@pytest.fixture(scope="module")
def specs() -> list[str]:
    """A random network around each block, and the simplest ones until there are fifty."""
    drawn = [_draw(kind) for kind in sorted(BLOCKS)]
    drawn = [[net for net in networks if not net.keeps_constants()] for networks in drawn]
    chosen = [networks[-1] for networks in drawn] + [networks[0] for networks in drawn]
    return [repr(net) for net in chosen[: max(MINIMUM, len(drawn))]]


@pytest.fixture(scope="module")
def of_another_process(specs: list[str]) -> list[Any]:
    """The graphs that a new process traces, in which strings hash to other values."""
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(specs), env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return list(json.loads(child.stdout))


def test_fifty_networks_have_the_same_graph_twice_after_a_forward_and_in_another_process(
    specs: list[str], of_another_process: list[Any]
) -> None:
    assert len(specs) >= MINIMUM
    for spec, expected in zip(specs, of_another_process, strict=True):
        net = evaluated(spec)
        model = net.build()
        assert as_json(traced(net, model)) == expected, spec
        with torch.no_grad():
            model(net.example())
        for same in (model, copy.deepcopy(model)):
            assert as_json(traced(net, same)) == expected, spec
