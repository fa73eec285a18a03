"""Channels whose number is used as a number elsewhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.testing import with_zeroed_consumers
from tests.support.rule_cases import TOKENS, check_pin_reason, tokens

PINNED = {
    "half of them by a plain number": (
        lambda x: torch.roll(x[:, : int(x.shape[1]) // 2], 1, 3),
        r"made plain by int\(\)|is sliced at a number in the code",
    ),
    "their number sizes other channels": (
        lambda x: (
            torch.ones(2, 2, 4, 8, 8).double().view(2, 2, x.shape[1] // 2, 8, 8).flatten(1, 2) * x.mean()
        ),
        r"its number sizes a reshape of other channels \(aten::view, test_dynamic_sizes",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])


SCALES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "square_root_of_a_shape": lambda m, q: q.shape[-1] ** 0.5,
    "square_root_by_math": lambda m, q: math.sqrt(q.size(-1)),
    "a_shape": lambda m, q: q.shape[-1],
    "one_by_a_shape": lambda m, q: 1 / q.shape[-1],
    "an_attribute": lambda m, q: m.q.out_features,
    "a_tensor": lambda m, q: torch.tensor(q.shape[-1], dtype=q.dtype),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("place", ["on_the_query", "on_the_product"])
def test_number_computed_from_a_size_is_marked_pinned_or_refused(name, place):
    """Such a number scales a softmax: with fewer channels, all weights of the attention change."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        q, k = m.q(x), m.k(x).transpose(1, 2)
        scale = SCALES[name](m, q)
        return ((q / scale) @ k if place == "on_the_query" else (q @ k) / scale).softmax(-1) @ x

    x = torch.randn(TOKENS).double()
    net = tokens(run, q=lambda: nn.Linear(12, 6), k=lambda: nn.Linear(12, 6))().double()
    graph = trace(net, x)
    units = graph.layers["q.weight"]
    if set(units) <= set(graph.statistics_units) or set(units) <= set(graph.pinned):
        return
    with pytest.raises(SurgeryError) as refused:
        prune_(net, graph, units[:2])
    assert set(units[:2]) <= set(refused.value.units)


class Checked(nn.Module):
    """Compare the number of channels with an attribute that nothing else reads, as Transformers and torchaudio do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.num_channels, self.how = 8, how
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        differs = {
            "unequal": lambda: x.shape[-1] != self.num_channels,
            "the other way": lambda: self.num_channels != x.shape[-1],
            "not equal": lambda: not x.size(-1) == self.num_channels,  # noqa: SIM201
            "shape": lambda: x.shape[1:] != (x.shape[1], self.num_channels),
        }[self.how]()
        if differs:
            raise ValueError("Make sure that the channels match")
        return self.last(x)


@pytest.mark.parametrize("how", ["unequal", "the other way", "not equal", "shape"])
def test_attribute_that_the_code_compares_with_channels_is_set(how):
    dense, x = Checked(how), torch.randn(2, 5, 3)
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    units = graph.layers["first.weight"][[1, 6]]
    record = prune_(pruned, graph, units)
    assert pruned.num_channels == 6
    assert record.attributes["num_channels"] == 6
    torch.testing.assert_close(pruned(x), with_zeroed_consumers(dense, graph, units)(x))
