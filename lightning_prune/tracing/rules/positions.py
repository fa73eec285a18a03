"""Rules of operators that select, order, accumulate or transform values along one dimension.

Along that dimension every value depends on its place, so that its ids are pinned. All other dimensions keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.tracker import Labels, Tracker

__all__ = ["label_others"]

aten = torch.ops.aten
ORDERED = "is picked or ordered by values"
INDEX = "selects by its values"


@rule(
    aten.topk, aten.sort, aten.kthvalue, aten.mode, aten.quantile, aten.nanquantile,
    aten.cumsum, aten.cumprod, aten.cummax, aten.cummin, aten.cumsum_, aten.cumprod_, aten.diff,
    aten._cummax_helper, aten._cummin_helper, aten.argsort, aten.searchsorted,
)  # fmt: skip
def order(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimension that is ordered or accumulated; keep the labels of the others."""
    source = call.args[0]
    tracker.pin_all([tensor for tensor in call.tensors if tensor is not source], INDEX)
    dim = call.arg("dim", -1)
    label_others(call, [dim if isinstance(dim, int) else -1], ORDERED, tracker)


@rule(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def fourier(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the transformed dimensions; keep the labels of the others."""
    label_others(call, call.args[1], "is transformed along its channels", tracker)


def label_others(call: OperatorCall, dims: Iterable[int], reason: str, tracker: Tracker) -> None:
    """Pin the ids along ``dims``; give the results the labels of the other dimensions."""
    source = call.args[0]
    changed = {dim % max(source.dim(), 1) for dim in dims}
    labels = _without(tracker.labels(source), changed, reason, tracker)
    for out in call.outputs:
        reduced = out.dim() < source.dim()  # a dimension that is not kept
        tracker.label(out, [ids for dim, ids in enumerate(labels) if not (reduced and dim in changed)])


def _without(labels: Labels, dims: set[int], reason: str, tracker: Tracker) -> Labels:
    for dim in dims:
        for ids in labels[dim] if dim < len(labels) else ():
            tracker.pin(ids, reason)
    return tuple(() if dim in dims else ids for dim, ids in enumerate(labels))


@rule(aten.index_select)
def index_select(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimension that is selected from; keep the labels of the others."""
    label_others(call, [call.args[1]], ORDERED, tracker)


@rule(aten.index)
def index(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimensions that an index tensor selects from (``x[:, idx]``); keep the labels of the others."""
    tracker.label(call.out, _indexed_labels(call.args[0], call.args[1], call.out.dim(), tracker))


@rule(aten.index_put, aten.index_put_, aten._index_put_impl_)
def index_put(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimensions that an index tensor selects (``x[:, idx] = y``); tie the values to the others."""
    target, indices, values = call.args[:3]
    rank = _index_rank(indices) + target.dim() - sum(tensor is not None for tensor in indices)
    labels = _indexed_labels(target, indices, rank, tracker)
    for back in range(1, values.dim() + 1):
        tracker.tie_operand(next(iter(labels[-back]), None), values, -back)
    _label_written(call, tracker.labels(target), tracker)


def _index_rank(indices: Sequence[Tensor | None]) -> int:
    return max(tensor.dim() for tensor in indices if tensor is not None)


def _indexed_labels(source: Tensor, indices: Sequence[Tensor | None], rank: int, tracker: Tracker) -> Labels:
    """Return the labels of ``source[indices]``, of ``rank`` dimensions.

    The dimensions of the index replace the first indexed one if the indexed dimensions are adjacent; otherwise they
    come first.
    """
    indexed = [dim for dim, tensor in enumerate(indices) if tensor is not None]
    for dim in indexed:
        tracker.pin(tracker.along(source, dim), "is picked by an index tensor")
    num_new = rank - (source.dim() - len(indexed))
    labels = [ids for dim, ids in enumerate(tracker.labels(source)) if dim not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    start = indexed[0] if adjacent else 0
    return (*labels[:start], *[()] * num_new, *labels[start:])


@rule(aten.gather, aten.take_along_dim)
def gather(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimension that is selected from; tie source and index along the others."""
    source, index, dim = call.arg("self"), call.arg("index", call.arg("indices")), call.arg("dim")
    labels = _tie_others(source, [index], dim, tracker)
    tracker.label(call.out, labels)


@rule(aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_)
@rule(aten.scatter_reduce, aten.scatter_reduce_)
def scatter(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimension along which values are written; tie target, index and values along the others."""
    target, dim = call.args[0], call.args[1]
    labels = _tie_others(target, call.tensors[1:], dim, tracker)
    _label_written(call, labels, tracker)


@rule(aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_, aten.index_fill, aten.index_fill_)
@rule(aten.index_reduce, aten.index_reduce_)
def index_write(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the dimension along which slices are written; tie target and slices along the others."""
    target, dim = call.args[0], call.args[1]
    slices = [tensor for tensor in call.tensors[2:] if tensor.dim() == target.dim()]
    labels = _tie_others(target, slices, dim, tracker)
    _label_written(call, labels, tracker)


def _label_written(call: OperatorCall, labels: Labels, tracker: Tracker) -> None:
    tracker.label(call.out, labels)
    if call.op._schema.is_mutable:  # in place: the first argument is the result
        tracker.label(call.args[0], labels)


def _tie_others(first: Tensor, others: Iterable[Tensor], dim: int, tracker: Tracker) -> Labels:
    """Tie tensors along all dimensions but ``dim``, along which all are pinned; return the common labels."""
    if not first.dim():
        return ()
    picked = dim % first.dim()
    labels = list(_without(tracker.labels(first), {picked}, ORDERED, tracker))
    for other in others:
        for ids in tracker.labels(other)[picked] if other.dim() else ():
            tracker.pin(ids, ORDERED)
        for at in set(range(min(first.dim(), other.dim()))) - {picked}:
            if other.shape[at] == first.shape[at]:
                tracker.tie(
                    tracker.along(first, at), tracker.along(other, at), "meets an index of fixed size"
                )
                labels[at] = labels[at] or tracker.labels(other)[at]
            else:  # fewer slices are read or written than there are
                for tensor in (first, other):
                    tracker.pin(tracker.along(tensor, at), INDEX)
                labels[at] = ()
    return tuple(labels)


@rule(aten.view_as_real, aten.view_as_real_copy)
def view_as_real(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the labels; the new last dimension, of real and imaginary part, has none."""
    tracker.label(call.out, [*tracker.labels(call.args[0]), ()])


@rule(aten.view_as_complex, aten.view_as_complex_copy)
def view_as_complex(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the labels; pin those along the last dimension, which becomes real and imaginary part."""
    source = call.args[0]
    labels = _without(tracker.labels(source), {source.dim() - 1}, "becomes real and imaginary part", tracker)
    tracker.label(call.out, labels[:-1])


rule(aten.real, aten.imag, aten._conj_physical)(same_labels)


@rule(aten.cdist, aten._cdist_forward, aten._euclidean_dist)
def distances(call: OperatorCall, tracker: Tracker) -> None:
    """Follow distances of (*, p, d) and (*, r, d): tie the d coordinates; the result has shape (*, p, r)."""
    left, right = call.args[:2]
    tracker.tie(tracker.along(left, -1), tracker.along(right, -1))
    batch = [tracker.labels(left)[dim] for dim in range(left.dim() - 2)]
    for dim in range(-min(left.dim(), right.dim()), -2):
        if left.shape[dim] == right.shape[dim]:
            tracker.tie(tracker.along(left, dim), tracker.along(right, dim))
    tracker.label(call.out, [*batch, tracker.labels(left)[-2], tracker.labels(right)[-2]])
