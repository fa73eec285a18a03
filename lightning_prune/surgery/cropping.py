"""Smaller operands for the numerical check: sizes along dimensions without channels are reduced."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["cropped_shapes"]


def cropped_shapes(operator: TracedOperator, labels: Sequence[Labels]) -> list[list[int]]:
    """Return the operands' shapes, made small along dimensions without channels where the operator allows it."""
    call, shapes = operator.call, [list(shape) for shape in operator.shapes]
    name = call.op._opname
    if name == "convolution":
        _crop_convolution(call, labels, shapes)
    elif name in ("mm", "addmm") and not labels[-2][0] and (name == "mm" or len(shapes[0]) < 2):
        shapes[-2][0] = min(shapes[-2][0], 4)
    elif torch.Tag.pointwise in call.op.tags or name in ("cat", "native_batch_norm"):
        _crop_equally(labels, shapes, call.args[1] if name == "cat" and len(call.args) > 1 else None)
    return shapes


def _crop_convolution(call: OperatorCall, labels: Sequence[Labels], shapes: list[list[int]]) -> None:
    """Crop the input to two positions of the kernel in each spatial dimension."""
    source, kernel = shapes[0], shapes[1][2:]
    if len(source) != len(shapes[1]) or any(labels[0][2:]):
        return
    stride, dilation, transposed = call.args[3], call.args[5], call.args[6]
    for dim, size in enumerate(kernel):
        step = 1 if transposed else stride[dim % len(stride)]
        source[2 + dim] = min(source[2 + dim], dilation[dim % len(dilation)] * (size - 1) + 1 + step)


def _crop_equally(labels: Sequence[Labels], shapes: list[list[int]], excluded: int | None) -> None:
    """Crop to 2 the dimensions, counted from the back as in broadcasting, that have no labels in any operand.

    The dimension ``excluded``, along which operands are concatenated, keeps its size.
    """
    rank = max(len(shape) for shape in shapes)
    for back in range(1, rank + 1):
        labelled = any(dims[-back] for dims in labels if len(dims) >= back)
        if labelled or (excluded is not None and (excluded % rank) == rank - back):
            continue
        for shape in shapes:
            if len(shape) >= back and shape[-back] > 2:
                shape[-back] = 2
