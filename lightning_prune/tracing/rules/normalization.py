"""Rules of normalisation, pooling, resampling and embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import passed_argument
from lightning_prune.tracing.rules.positions import label_others
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.traced_int import TracedInt
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten
RESAMPLED = "is pooled or resampled along its channels"


@rule(
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training, aten._batch_norm_with_update, aten._batch_norm_no_update,
    aten.cudnn_batch_norm, aten.miopen_batch_norm, aten._batch_norm_impl_index,
)  # fmt: skip
def batch_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Tie scale, shift and running statistics to the channels (dimension 1)."""
    source = call.args[0]
    for parameter in call.args[1:5]:
        if isinstance(parameter, Tensor):
            tracker.tie(tracker.along(parameter, 0), tracker.along(source, 1))
    # Weight standardisation passes a weight through a batch norm: its inputs are among the averaged dimensions.
    for dim, arrays in enumerate(tracker.labels(source)):
        if dim != 1 and arrays:
            tracker.mark_statistics(arrays[0])
    same_labels(call, tracker)


@rule(aten.native_layer_norm, aten.layer_norm, aten.rms_norm, aten._fused_rms_norm)
def layer_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Tie scale and shift to the normalised dimensions, whose sizes the code passes."""
    source, shape = call.args[0], call.args[1]
    passed = passed_argument(call, 1, "normalized_shape")
    for back in range(1, len(shape) + 1):
        ids = tracker.along(source, -back)
        for parameter in call.args[2:4]:
            if isinstance(parameter, Tensor):
                tracker.tie(ids, tracker.along(parameter, -back))
        if ids is not None:
            tracker.mark_statistics(ids)
            tracker.require_size(passed[-back] if isinstance(passed, (tuple, list)) else None, ids)
    same_labels(call, tracker)


@rule(aten.native_group_norm, aten.group_norm)
def group_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Tie scale, shift and groups: every group keeps the same positions."""
    source, groups = call.args[0], call.arg("group", call.arg("num_groups"))
    ids = tracker.along(source, 1)
    for parameter in (call.arg("weight"), call.arg("bias")):
        if isinstance(parameter, Tensor):
            tracker.tie(ids, tracker.along(parameter, 0))
    if ids is not None:
        _tie_norm_groups(call, ids, groups, tracker)
    same_labels(call, tracker)


def _tie_norm_groups(call: OperatorCall, ids: Ids, groups: int, tracker: Tracker) -> None:
    """Tie the groups; with one channel per group, let the number of groups follow the channels instead."""
    if groups == len(ids) and groups > 1:
        passed = passed_argument(call, 1, "num_groups")
        tracker.require_size(passed if isinstance(passed, TracedInt) else groups, ids)
    else:
        tracker.tie_across(ids.view(groups, -1))
        tracker.mark_statistics(ids)


@rule(aten._weight_norm_interface, aten._weight_norm)
def weight_norm(call: OperatorCall, tracker: Tracker) -> None:
    """Tie the magnitudes to the filters of the direction; the norm is taken over the inputs."""
    direction, magnitude = call.args[:2]
    dim = call.arg("dim") or 0
    tracker.tie(tracker.along(direction, dim), tracker.along(magnitude, dim if magnitude.dim() > 1 else 0))
    for other, arrays in enumerate(tracker.labels(direction)):
        if other != dim and arrays:
            tracker.mark_statistics(arrays[0])
    tracker.label(call.outputs[0], tracker.labels(direction))


#: number of spatial dimensions -> operators that mix these last dimensions and keep all others
_SPATIAL_OPERATORS = {
    1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
    "_upsample_nearest_exact1d reflection_pad1d replication_pad1d",
    2: "avg_pool2d max_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d replication_pad2d grid_sampler_2d "
    "grid_sampler fractional_max_pool2d",
    3: "avg_pool3d max_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_avg_pool3d "
    "adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d "
    "reflection_pad3d replication_pad3d grid_sampler_3d",
}


def _register_spatial(rank: int, names: str) -> None:
    def spatial(call: OperatorCall, tracker: Tracker) -> None:
        _pin_spatial(call, rank, tracker)

    for name in names.split():
        rule(getattr(aten, name))(spatial)


for _rank, _names in _SPATIAL_OPERATORS.items():
    _register_spatial(_rank, _names)


def _pin_spatial(call: OperatorCall, rank: int, tracker: Tracker) -> None:
    """Pin ids along the last ``rank`` dimensions; keep the labels of the others."""
    label_others(call, range(-rank, 0), RESAMPLED, tracker)


@rule(aten.max_unpool2d, aten.max_unpool3d)
def max_unpool(call: OperatorCall, tracker: Tracker) -> None:
    """Tie values to the indices of their pixels, channel by channel."""
    source, indices = call.args[:2]
    spatial = 2 if "2d" in call.op._opname else 3
    for dim in range(-source.dim(), -spatial):
        tracker.tie(tracker.along(source, dim), tracker.along(indices, dim))
    _pin_spatial(call, spatial, tracker)


@rule(aten.embedding)
def embedding(call: OperatorCall, tracker: Tracker) -> None:
    """Pin the rows of the table, which the data selects; its columns are channels."""
    table, index = call.args[:2]
    tracker.pin(tracker.along(table, 0), "is looked up by the data")
    tracker.register_filters(tracker.along(table, 1))
    tracker.label(call.out, [*tracker.labels(index), tracker.labels(table)[1]])
