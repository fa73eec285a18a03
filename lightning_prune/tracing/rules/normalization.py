"""Normalisation, pooling, resampling, lookups (level 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import argument
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.traced_int import TracedInt
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


@rule(
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training, aten._batch_norm_with_update, aten._batch_norm_no_update,
    aten.cudnn_batch_norm, aten.miopen_batch_norm, aten._batch_norm_impl_index,
)  # fmt: skip
def batch_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Scale, shift and running statistics follow the channels (dimension 1)."""
    source = call.args[0]
    for parameter in call.args[1:5]:
        if isinstance(parameter, Tensor):
            tracker.tie(tracker.along(parameter, 0), tracker.along(source, 1))
    for dim, arrays in enumerate(tracker.labels(source)):
        if dim != 1 and arrays:  # weights that are standardised over their inputs
            tracker.mixes(arrays[0])
    same_labels(call, tracker)


@rule(aten.native_layer_norm, aten.layer_norm, aten.rms_norm, aten._fused_rms_norm)
def layer_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Statistics over the last dimensions; the code passes their sizes."""
    source, shape = call.args[0], call.args[1]
    passed = argument(call, 1, "normalized_shape")
    for back in range(1, len(shape) + 1):
        ids = tracker.along(source, -back)
        for parameter in call.args[2:4]:
            if isinstance(parameter, Tensor):
                tracker.tie(ids, tracker.along(parameter, -back))
        if ids is not None:
            tracker.mixes(ids)
            tracker.use(passed[-back] if isinstance(passed, (tuple, list)) else None, ids)
    same_labels(call, tracker)


@rule(aten.native_group_norm, aten.group_norm)
def group_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Every group keeps the same positions; where each channel is its own group, the number of groups follows."""
    source, groups = call.args[0], call.arg("group", call.arg("num_groups"))
    ids = tracker.along(source, 1)
    for parameter in (call.arg("weight"), call.arg("bias")):
        if isinstance(parameter, Tensor):
            tracker.tie(ids, tracker.along(parameter, 0))
    if ids is not None:
        _grouped(call, ids, groups, tracker)
    same_labels(call, tracker)


def _grouped(call: OperatorCall, ids: Ids, groups: int, tracker: Tracker) -> None:
    if groups == len(ids) and groups > 1:
        passed = argument(call, 1, "num_groups")
        tracker.use(passed if isinstance(passed, TracedInt) else groups, ids)
    else:
        tracker.tie_across(ids.view(groups, -1))
        tracker.mixes(ids)


@rule(aten._weight_norm_interface, aten._weight_norm)
def weight_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Direction times magnitude: the magnitude belongs to the direction's filters."""
    direction, magnitude = call.args[:2]
    dim = call.arg("dim") or 0
    tracker.tie(tracker.along(direction, dim), tracker.along(magnitude, dim if magnitude.dim() > 1 else 0))
    for other, arrays in enumerate(tracker.labels(direction)):
        if other != dim and arrays:  # the norm is taken over the inputs
            tracker.mixes(arrays[0])
    tracker.label(call.outputs[0], tracker.labels(direction))


def _neighbours(rank: int) -> None:
    """Register the operators that mix the last ``rank`` dimensions and leave the others alone."""
    names = {
        1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
        "_upsample_nearest_exact1d reflection_pad1d replication_pad1d",
        2: "avg_pool2d max_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d grid_sampler_2d "
        "grid_sampler fractional_max_pool2d",
        3: "avg_pool3d max_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_avg_pool3d "
        "adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d "
        "reflection_pad3d replication_pad3d grid_sampler_3d",
    }[rank]

    def spatial(call: OperatorCall, tracker: Tracker) -> None:
        _spatial(call, rank, tracker)

    for name in names.split():
        rule(getattr(aten, name))(spatial)


def _spatial(call: OperatorCall, rank: int, tracker: Tracker) -> None:
    source = call.args[0]
    labels = list(tracker.labels(source))
    for dim in range(-rank, 0):
        for ids in labels[dim]:
            tracker.pin(ids, "is pooled or resampled along its channels")
        labels[dim] = ()
    for out in call.outputs:
        tracker.label(out, labels)


@rule(aten.max_unpool2d, aten.max_unpool3d)
def max_unpool(call: OperatorCall, tracker: Tracker) -> None:
    """Values go back to the pixels that they came from: values and places belong to the same channels."""
    source, places = call.args[:2]
    spatial = 2 if "2d" in call.op._opname else 3
    for dim in range(-source.dim(), -spatial):
        tracker.tie(tracker.along(source, dim), tracker.along(places, dim))
    _spatial(call, spatial, tracker)


for _rank in (1, 2, 3):
    _neighbours(_rank)


@rule(aten.embedding)
def embedding(call: OperatorCall, tracker: Tracker) -> None:
    """Rows are picked by the data and must stay; columns are channels."""
    table, index = call.args[:2]
    tracker.pin(tracker.along(table, 0), "is looked up by the data")
    tracker.filter(tracker.along(table, 1))
    tracker.label(call.out, [*tracker.labels(index), tracker.labels(table)[1]])


@rule(aten.index_select, aten.gather, aten.take_along_dim, aten.topk, aten.sort, aten.cumsum, aten.cumprod)
@rule(aten.scatter, aten.scatter_add, aten.index_add, aten.index_copy)
def along_one(call: OperatorCall, tracker: Tracker) -> None:
    """One dimension is picked from or ordered by values, and must stay; the others are left alone."""
    source = call.args[0]
    dim = (call.arg("dim", -1)) % max(source.dim(), 1)
    tracker.pin_all([t for t in call.tensors if t is not source], "picks by its values")
    tracker.pin(tracker.along(source, dim), "is picked or ordered by values")
    labels = [() if d == dim else ids for d, ids in enumerate(tracker.labels(source))]
    for out in call.outputs:
        same = [ids if out.shape[d] == source.shape[d] else () for d, ids in enumerate(labels)]
        tracker.label(out, same)


@rule(aten.index)
def index(call: OperatorCall, tracker: Tracker) -> None:
    """``x[:, idx]``: the indexed dimensions must stay, the others keep their ids."""
    source, indices = call.args
    picked = [dim for dim, at in enumerate(indices) if at is not None]
    for dim in picked:
        tracker.pin(tracker.along(source, dim), "is picked by an index tensor")
    rank = call.out.dim() - (source.dim() - len(picked))
    labels = [ids for dim, ids in enumerate(tracker.labels(source)) if dim not in picked]
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    at = picked[0] if adjacent else 0
    tracker.label(call.out, [*labels[:at], *[()] * rank, *labels[at:]])
