"""Compare the multiply-accumulates that a cut takes from the recorded operators with what the graph predicts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.surgery.masks import surviving_shape
from lightning_prune.surgery.survivors import Survivors
from lightning_prune.tracing.tracker import TracedOperator

__all__ = ["costs_as_predicted"]

aten = torch.ops.aten
_CONVOLUTION = aten.convolution.default


def costs_as_predicted(
    graph: ChannelGraph, evidence: DenseTrace, survivors: Survivors, kept: NDArray[np.bool_]
) -> bool:
    """Whether the multiply-accumulates that the shapes lose are those that the graph predicts."""
    lost = 0
    for operator in evidence.tracker.operators[: evidence.tracker.num_costed]:
        if (macs := _MACS.get(operator.call.op)) is not None and survivors.affects(operator):
            shapes = [*operator.shapes, *(out.shape for out in operator.call.outputs)]
            each = zip(shapes, survivors.masks(operator.labels), strict=True)
            lost += macs(operator, shapes) - macs(operator, [surviving_shape(*pair) for pair in each])
    model = graph.cost_models["macs"]
    return lost == int(model.per_term(np.ones_like(kept)).sum()) - int(model.per_term(kept).sum())


def _convolution_macs(operator: TracedOperator, shapes: Sequence[Sequence[int]]) -> int:
    source, weight, out = shapes[0], shapes[1], shapes[len(operator.shapes)]
    return prod(source if operator.call.args[6] else out) * prod(weight[1:])


def _product_macs(operator: TracedOperator, shapes: Sequence[Sequence[int]]) -> int:
    left, right = shapes[len(operator.shapes) - 2 : len(operator.shapes)]
    return prod(left) * right[-1]


_MACS = {
    _CONVOLUTION: _convolution_macs,
    aten.mm.default: _product_macs,
    aten.bmm.default: _product_macs,
    aten.addmm.default: _product_macs,
}
