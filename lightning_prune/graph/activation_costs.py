"""Activation memory as a resource: what the operators of one forward write (level 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.graph.costs import Term
from lightning_prune.graph.layer_costs import evidence_of
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.tracker import Labels

__all__ = ["activations"]

aten = torch.ops.aten
#: how many indices for each unit in the array, or for good
Side = tuple[int, Units | None]
#: their further results are a few numbers per channel or sample, and depend on the device
_NORMS = {
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training,
    aten.native_layer_norm, aten.native_group_norm,
}  # fmt: skip


def activations(graph: ChannelGraph) -> list[Term]:
    """How many elements the operators of one eval-mode forward on the example input write, summed.

    Every tensor with memory of its own counts, when it is written: results of convolutions, norms, activations,
    additions, pooling (with its indices), copies. Views and what is done in place count nothing, nor do parameters,
    buffers and the input. It is about what training keeps for the backward, in bytes times the size of an element
    (4 in float32), and exact for any cut, but where a single channel or head is left, and torch saves itself a copy.
    It is not the peak of a forward: that is a maximum over time, of memory that is used again, and no sum.

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
    evidence = evidence_of(graph)
    tracker, pinned = evidence.tracker, np.array(sorted(graph.pinned), dtype=np.int64)
    terms: list[Term] = []
    for followed in tracker.followed[: tracker.counted]:
        labels = followed.labels[len(followed.call.tensors) :]
        for tensor, known in zip(written(followed.call), labels, strict=False):
            shape = [int(size) for size in tensor.shape]
            terms += _terms(followed.call.module, shape, known, evidence, pinned)
    return terms


def written(call: OperatorCall) -> Sequence[Tensor]:
    """The results of an operator that have memory of their own."""
    shares = any(returned.alias_info is not None for returned in call.op._schema.returns)
    if shares or call.op == aten._unsafe_view.default:
        return []
    return call.outputs[:1] if call.op.overloadpacket in _NORMS else call.outputs


def _terms(
    module: str, shape: Sequence[int], labels: Labels, evidence: DenseTrace, pinned: Units
) -> Iterator[Term]:
    """The elements of a tensor: a product over its dimensions of what stays for good and what may go."""
    sides = [_side(size, arrays, evidence, pinned) for size, arrays in zip(shape, labels, strict=True)]
    for chosen in product(*sides):
        scale = prod(number for number, _ in chosen)
        yield Term(module, scale, tuple(units for _, units in chosen if units is not None))


def _side(size: int, arrays: Sequence[Ids], evidence: DenseTrace, pinned: Units) -> list[Side]:
    """One dimension: indices that always stay, and those of units.

    Of two dimensions merged into one, the trace pins all but one.
    """
    for ids in arrays:
        units = evidence.unit_of[evidence.components[ids.numpy()]]
        if not ((units < 0) | np.isin(units, pinned)).all():
            stay = int((units < 0).sum())
            return [(1, units[units >= 0]), *([(stay, None)] if stay else [])]
    return [(size, None)]
