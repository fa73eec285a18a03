"""Cases and checks of the tests of rules: one small network per operator or pattern.

Each case states how many units are prunable, so that a tie too many is noticed as well as a tie too few. It names
each layer that must not shrink, with the reason given to the user. All networks are in double precision, so that a
correct result differs from an oracle by rounding errors only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelGraph, prune_, trace
from lightning_prune.testing import randomise_
from tests.support.nets import Net, counted_macs, cut, parameters, random_units

IMAGE, TOKENS, SIGNAL, VOLUME = (2, 3, 8, 8), (2, 5, 7), (2, 3, 16), (2, 3, 6, 6, 6)
OUTPUT = "is the network's output"
TOLERANCE = 1e-12


@dataclass
class Case:
    """A network and what its trace and its cut must give.

    Attributes:
        build: makes the network.
        units: the number of prunable units.
        shape: of the example input.
        pinned: layer that must not shrink -> pattern of the reason; the last layer is always pinned.
        dead: compare with dead filters; False if an activation function has f(0) != 0.
        zeroed: compare with zeroed consumers; False if something else than a weight reads the filters.
        macs: compare MACs with torch's counter; False if it does not count an operator.
        mixes: the network takes statistics across channels, but not in what reaches the output.
    """

    build: Callable[[], nn.Module]
    units: int
    shape: tuple[int, ...] = IMAGE
    pinned: dict[str, str] = field(default_factory=dict)
    dead: bool = True
    zeroed: bool = True
    macs: bool = True
    mixes: bool = False

    @property
    def example(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).double()


# -- networks -----------------------------------------------------------------------------------------------


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def images(run: Callable[..., Tensor], out: int = 8, **parts: Any) -> Callable[[], nn.Module]:
    """Return a function that builds: stem (3 -> 8 channels), ``run(m, x)``, head (``out`` -> 2 channels)."""

    def build() -> nn.Module:
        modules = _built(parts)
        return Net(lambda m, x: m.head(run(m, m.stem(x))), stem=conv(3, 8), **modules, head=conv(out, 2, 1))

    return build


def tokens(run: Callable[..., Tensor], dim: int = 12, **parts: Any) -> Callable[[], nn.Module]:
    """Return a function that builds: embed (7 -> ``dim`` features), ``run(m, x)``, head (``dim`` -> 2 features)."""

    def build() -> nn.Module:
        modules, embed = _built(parts), nn.Linear(7, dim)
        return Net(lambda m, x: m.head(run(m, m.embed(x))), embed=embed, **modules, head=nn.Linear(dim, 2))

    return build


def _built(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part() if callable(part) else part for name, part in parts.items()}


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


# -- checks -------------------------------------------------------------------------------------------------


def check_units(case: Case) -> None:
    """Check the number of prunable units and the reasons why layers are pinned."""
    torch.manual_seed(0)
    graph = trace(case.build().double(), case.example)
    assert len(graph.prunable) == case.units
    last = "head.weight" if "head.weight" in graph.layers else list(graph.layers)[-1]
    expected = {**case.pinned, last: OUTPUT}
    for name, units in graph.layers.items():
        reasons = {graph.pinned[unit] for unit in units.tolist() if unit in graph.pinned}
        assert bool(reasons) == (name in expected), (name, reasons)
        assert all(re.search(expected[name], reason) for reason in reasons), (name, reasons)
    assert not graph.unsupported
    assert bool(len(graph.statistics_units)) == case.mixes


def check_cut(case: Case, seed: int) -> None:
    """Remove a random share of the units; compare outputs with the oracles, and costs with the predicted ones."""
    torch.manual_seed(seed)
    if not case.units:
        pytest.skip("no unit is prunable")
    x = case.example
    outcome = cut(case.build().double(), x, seed=seed, share=(0.3, 0.5, 0.8)[seed])
    graph, remove = outcome.graph, outcome.remove
    assert len(remove)
    if case.dead:
        assert outcome.dead < TOLERANCE
    if case.zeroed:
        assert outcome.zeroed < TOLERANCE
    assert parameters(outcome.model) == graph.cost("params", remove) < parameters(outcome.dense)
    after = trace(outcome.model, x)
    predicted = graph.cost("macs", remove)
    assert predicted < graph.cost("macs")
    assert after.cost("macs") == predicted
    if case.macs:
        assert after.cost("macs") == counted_macs(outcome.model, x)


def check_same_channels(function: Callable[[Tensor], Tensor]) -> None:
    """Check that a function of images leaves all 8 units prunable, and that a cut matches both oracles."""
    x = torch.randn(2, 3, 8, 8).double()
    outcome = cut(images(lambda m, x: function(x))().double(), x, seed=1)
    assert len(outcome.graph.prunable) == 8
    assert not outcome.graph.unsupported
    assert len(outcome.remove) == 4
    assert outcome.dead < TOLERANCE
    assert outcome.zeroed < TOLERANCE


def check_zeroed_consumers_only(function: Callable[[Tensor], Tensor]) -> None:
    """Check a function with f(0) != 0: zeroed consumers agree with the cut, dead filters do not."""
    outcome = cut(images(lambda m, x: function(x))().double(), torch.randn(2, 3, 8, 8).double(), seed=1)
    assert len(outcome.graph.prunable) == 8
    assert len(outcome.remove) == 4
    assert outcome.zeroed < TOLERANCE
    assert outcome.dead > 1e-3  # else `check_same_channels` applies


def check_pin_reason(function: Callable[[Tensor], Tensor], reason: str) -> None:
    """Check that a function of images pins all filters of the stem, with a reason that names the operator."""
    x = torch.randn(2, 3, 8, 8).double()
    width = function(torch.zeros(2, 8, 8, 8).double()).shape[1]
    graph: ChannelGraph = trace(images(lambda m, x: function(x), width)().double(), x)
    reasons = {graph.pinned.get(unit, "free") for unit in graph.layers["stem.weight"].tolist()}
    assert all(re.search(reason, actual) for actual in reasons), reasons
    assert list(graph.unsupported) == (["tests::opaque"] if "tests::opaque" in reason else [])


def pruned_with_statistics(
    build: Callable[[], nn.Module], x: Tensor, layer: str, seed: int = 0
) -> tuple[Any, Any, list[int]]:
    """Remove half of the units of ``layer``, which are all statistics units.

    Returns:
        The dense network, the pruned one, and the remaining filters of the layer.
    """
    dense = randomise_(build()).double().eval()
    small = copy.deepcopy(dense)
    graph = trace(small, x)
    units = np.intersect1d(graph.layers[layer], graph.prunable)
    assert set(units) <= set(graph.statistics_units)
    record = prune_(small, graph, random_units(graph, seed, 0.5, among=units))
    return dense, small, record.kept[layer][graph.filter_dims[layer]]


def check_statistics(
    expected_of: Callable[[nn.Module, Tensor, list[int]], Tensor], parts: dict[str, Any]
) -> None:
    """Compare an operator across features with the same operator on the remaining features.

    Args:
        expected_of: computes the result from the dense network, the features and the indices of the remaining ones.
        parts: the part ``n`` of the network is the operator.
    """
    x = torch.randn(TOKENS).double()
    dense, small, kept = pruned_with_statistics(tokens(lambda m, x: m.n(x), **parts), x, "embed.weight")
    expected = expected_of(dense, dense.embed(x), kept) @ dense.head.weight[:, kept].t() + dense.head.bias
    assert len(kept) == 6
    assert torch.allclose(small(x), expected, atol=1e-12)
