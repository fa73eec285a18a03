"""Tests of the check by masks: it never accepts a call that the check by numbers rejects."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from timm.layers import ScaledStdConv2d
from torch import nn

from lightning_prune import prune_, trace
from lightning_prune.surgery import numerical_check
from lightning_prune.surgery.mask_check import CHECKS
from lightning_prune.surgery.masks import Mask
from lightning_prune.surgery.survivors import Survivors
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.tracker import TracedOperator
from tests.support.nets import Small
from tests.support.random_cuts import random_units

Pairs = tuple[list[tuple[TracedOperator, TracedOperator]], Survivors]


class Moves(nn.Module):
    """Moves, mixes and compares channels by operators that convolutional networks seldom use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.heads, self.bias = nn.GroupNorm(16, 16), nn.Parameter(torch.randn(16, 9, 9))
        self.rows = nn.Parameter(torch.randn(6, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.heads(self.first(x))[:, :16].roll(2, 3)
        y = y.unsqueeze(1).squeeze(1) + torch.einsum("bchw,hc->bch", y, self.rows).unsqueeze(-1)
        scores = y.flatten(2)[..., :9].unsqueeze(-1)  # (batch, heads, 9, 1)
        z = nn.functional.scaled_dot_product_attention(scores, scores, scores, self.bias)
        y = y * z.squeeze(-1).mean(-1, keepdim=True).unsqueeze(-1)
        return self.last(y / y.norm(dim=(2, 3), keepdim=True).expand_as(y))


NETWORKS = {
    "moves": lambda: (Moves(), 8),
    "small": lambda: (Small(), 16),
    "shufflenet": lambda: (tv.shufflenet_v2_x0_5(weights=None), 32),
    "mobilenet": lambda: (tv.mobilenet_v3_small(weights=None), 32),
    "regnet": lambda: (tv.regnet_y_400mf(weights=None), 32),
    "vit": lambda: (timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32), 32),
}


def pairs_of_random_cut(monkeypatch: pytest.MonkeyPatch, model: nn.Module, size: int) -> Pairs:
    """Operators before and after a random cut, in pairs, and what survives."""
    calls: list[tuple[list[TracedOperator], list[TracedOperator], np.ndarray]] = []
    original = numerical_check.mismatches

    def record(
        dense: list[TracedOperator], small: list[TracedOperator], alive: np.ndarray, *numbers: bool
    ) -> Iterator[tuple[TracedOperator, str]]:
        calls.append((dense, small, alive))
        yield from original(dense, small, alive, *numbers)

    monkeypatch.setattr("lightning_prune.surgery.proof.mismatches", record)
    graph = trace(model, torch.zeros(2, 3, size, size))
    monkeypatch.setattr("lightning_prune.surgery.proof.is_proven", lambda *_: False)  # trace it in any case
    prune_(model, graph, random_units(graph, np.random.default_rng(0), 0.4, graph.prunable))
    dense, small, alive = calls[0]
    return list(numerical_check._pairs(dense, small, Survivors(alive))), Survivors(alive)


def with_wrong_label(operator: TracedOperator, generator: np.random.Generator) -> TracedOperator:
    """The same operator with the ids of one dimension permuted or removed."""
    labels = copy.copy(operator.labels)
    places = [(i, d) for i, dims in enumerate(labels) for d, arrays in enumerate(dims) if arrays]
    if not places:
        return operator
    at, dim = places[generator.integers(len(places))]
    wrong: tuple[Ids, ...] = ()
    if generator.random() < 0.8:
        ids = labels[at][dim][0]
        wrong = (ids[torch.from_numpy(generator.permutation(len(ids)))],)
    labels[at] = tuple(wrong if d == dim else arrays for d, arrays in enumerate(labels[at]))
    return replace(operator, labels=labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_and_numbers_agree_under_wrong_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pairs, survivors = pairs_of_random_cut(monkeypatch, *NETWORKS[name]())
    generator, num_wrong = np.random.default_rng(1), 0
    for before, after in pairs:
        comparable = survivors.affects(before) and numerical_check.is_comparable(before.call)
        if not comparable or before.mixes_channels:
            continue
        for attempt in range(3):
            operator = with_wrong_label(before, generator) if attempt else before
            count = len(operator.shapes)
            masks = survivors.masks(operator.labels[:count]), survivors.masks(operator.labels[count:])
            shapes = zip(operator.shapes, after.shapes, operator.labels, strict=False)
            wrong_shape = any(numerical_check._check_shape(*each, survivors) for each in shapes)
            accepted = numerical_check.masks_agree(operator, after, *masks)
            if wrong_shape:
                continue
            problem = numerical_check._check_by_numbers(operator, after, survivors)
            assert not (accepted and problem), f"{before.call}: {problem}"
            num_wrong += bool(problem)
    assert num_wrong, "no wrong label changed a result"


def test_most_operators_of_common_networks_need_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check by numbers is slow and must stay the exception."""
    checked: list[str] = []
    monkeypatch.setattr(
        numerical_check, "_check_by_numbers", lambda before, *rest: checked.append(str(before.call))
    )
    for name in ("small", "mobilenet", "regnet", "vit"):
        torch.manual_seed(0)
        pairs, _ = pairs_of_random_cut(monkeypatch, *NETWORKS[name]())
        assert len(checked) <= len(pairs) // 20, checked
        checked.clear()


def test_a_norm_of_weights_may_lose_inputs_as_well_as_filters() -> None:
    """timm's nf_resnet26: a batch norm standardises a weight; its gain runs along the filters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), ScaledStdConv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    prune_(model, graph, [*graph.layers["0.weight"][:3], *graph.layers["2.weight"][1:4]])
    assert model[2].weight.shape == (3, 5, 1, 1)


_ = None
K = np.array([True, False, True, True])
FEWER = np.array([True, False, False, True])


def norm_of(sizes: list[int], source: list[Mask], scale: list[Mask], out: list[Mask]) -> bool:
    """The verdict on a layer norm of (2, 3, 4) over the last dimension, which gets ``sizes`` after the cut."""
    x, w = torch.zeros(2, 3, 4), torch.zeros(4)
    op = torch.ops.aten.native_layer_norm.default
    results = op(x, [4], w, w, 1e-5)
    dense = _call(op, (x, [4], w, w, 1e-5), results)
    small = replace(dense, call=replace(dense.call, args=(x, sizes, w, w, 1e-5)))
    return CHECKS[op][0](dense, small, [source, scale, scale], [out, [None] * 3, [None] * 3])


def _call(op: Any, args: tuple[Any, ...], outputs: Sequence[torch.Tensor]) -> TracedOperator:
    call = OperatorCall(op, args, {}, tuple(outputs), "", None, "")
    return TracedOperator(call, [], [x.shape for x in call.tensors], False)


@pytest.mark.parametrize(
    ("sizes", "source", "scale", "out", "right"),
    [
        ([3], [_, _, K], [K], [_, _, K], True),
        ([4], [_, _, K], [K], [_, _, K], False),  # passes the old size
        ([3], [_, _, K], [FEWER], [_, _, K], False),  # scales other channels
        ([3], [_, _, K], [_], [_, _, K], False),
        ([3], [_, _, K], [K], [_, _, _], False),  # its reader expects all channels
        ([4], [_, np.array([True, False, True]), _], [_], [_, np.array([True, False, True]), _], False),
    ],
)
def test_a_layer_norm_keeps_what_its_parameters_keep(
    sizes: list[int], source: list[Mask], scale: list[Mask], out: list[Mask], right: bool
) -> None:
    assert norm_of(sizes, source, scale, out) == right


@pytest.mark.parametrize(
    ("source", "out", "right"),
    [([_, K], [_, K], True), ([_, K], [_, FEWER], False), ([K, _], [K, _], False), ([_, _], [_, K], False)],
)
def test_padding_needs_its_dimensions_whole(source: list[Mask], out: list[Mask], right: bool) -> None:
    x = torch.zeros(4, 4)
    op = torch.ops.aten.constant_pad_nd.default  # the first dimension is padded
    dense = _call(op, (x, [0, 0, 1, 0], 0.0), [op(x, [0, 0, 1, 0], 0.0)])
    assert CHECKS[op][0](dense, dense, [source], [out]) == right
