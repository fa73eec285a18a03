"""Activation memory as a resource: the elements that the operators of one forward write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.graph.costs import Term
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.tracker import Labels

__all__ = ["activations"]

aten = torch.ops.aten
#: A share of the indices of a dimension: (number of fixed indices, None), or (1, unit of each removable index).
DimensionPart = tuple[int, Units | None]
#: Only their first result counts: the others are a few numbers per channel or sample, and depend on the device.
_NORMS = {
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training,
    aten.native_layer_norm, aten.native_group_norm,
}  # fmt: skip


def activations(graph: ChannelGraph) -> list[Term]:
    """Return the number of elements that the operators of one eval-mode forward on the example input write, as terms.

    Counted is every tensor with its own memory: results of convolutions, norms, activation functions, additions,
    pooling (with its indices), copies. Not counted are views, in-place results, parameters, buffers and the input.

    In bytes (times 4 in float32), this approximates what training stores for the backward pass. It is not the peak
    memory of a forward, which reuses memory. The number is exact for any cut, except where a single channel or head
    remains and torch itself avoids a copy.

    Raises:
        ValueError: the graph was not made by :func:`~lightning_prune.trace`.

    Example:
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 10, 10)).with_resources({"activations": activations})
        >>> graph.cost("activations") == (8 + 8 + 2) * 8 * 8
        True
        >>> graph.cost("activations", remove=[0]) == (7 + 7 + 2) * 8 * 8
        True
    """
    dense = dense_trace_of(graph)
    pinned = np.array(sorted(graph.pinned), dtype=np.int64)
    terms: list[Term] = []
    for operator in dense.tracker.operators[: dense.tracker.num_costed]:
        result_labels = operator.labels[len(operator.call.tensors) :]
        for tensor, labels in zip(_written_results(operator.call), result_labels, strict=False):
            shape = [int(size) for size in tensor.shape]
            terms += _terms(operator.call.module, shape, labels, dense, pinned)
    return terms


def _written_results(call: OperatorCall) -> Sequence[Tensor]:
    """Return the results of an operator that have their own memory."""
    shares_memory = any(result.alias_info is not None for result in call.op._schema.returns)
    if shares_memory or call.op == aten._unsafe_view.default:
        return []
    return call.outputs[:1] if call.op.overloadpacket in _NORMS else call.outputs


def _terms(
    module: str, shape: Sequence[int], labels: Labels, dense: DenseTrace, pinned: Units
) -> Iterator[Term]:
    """Yield terms whose sum is the number of elements of a tensor.

    Each dimension is a sum of fixed and removable indices; the product of these sums is expanded.
    """
    dims = [_dimension_parts(size, arrays, dense, pinned) for size, arrays in zip(shape, labels, strict=True)]
    for parts in product(*dims):
        scale = prod(number for number, _ in parts)
        yield Term(module, scale, tuple(units for _, units in parts if units is not None))


def _dimension_parts(
    size: int, arrays: Sequence[Ids], dense: DenseTrace, pinned: Units
) -> list[DimensionPart]:
    """Split a dimension into its removable and its fixed indices.

    Of two dimensions that were merged into this one, the trace pins all but one.
    """
    for ids in arrays:
        units = dense.unit_of[dense.components[ids.numpy()]]
        if not ((units < 0) | np.isin(units, pinned)).all():
            num_fixed = int((units < 0).sum())
            return [(1, units[units >= 0]), *([(num_fixed, None)] if num_fixed else [])]
    return [(size, None)]
