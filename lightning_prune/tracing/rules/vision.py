"""Rules of torchvision's operators: deformable convolution, pooling of regions, suppression of boxes.

They are registered by name, since torchvision may be absent or imported later.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.registry import rule_by_name
from lightning_prune.tracing.tracker import Tracker

REGIONS = "are coordinates of regions"


@rule_by_name("torchvision::deform_conv2d")
def deform_conv2d(call: OperatorCall, tracker: Tracker) -> None:
    """Follow (input, weight, offset, mask, bias): as a convolution; the offsets of positions are pinned."""
    source, weight, offset, mask, bias = call.args[:5]
    groups, offset_groups = call.args[11], call.args[12]
    tracker.pin_all([offset, mask], "moves the positions of a deformable convolution")
    ids = tracker.along(source, 1)
    if ids is not None and offset_groups > 1:  # neighbouring channels share offsets
        tracker.tie_across(ids.view(offset_groups, -1))
    out = _tie_weight(ids, weight, groups, tracker)
    tracker.tie(tracker.along(bias, 0), out)
    tracker.label(call.out, [tracker.labels(source)[0], () if out is None else (out,), (), ()])
    _register_macs(call, weight, out, tracker)


def _tie_weight(ids: Ids | None, weight: Tensor, groups: int, tracker: Tracker) -> Ids | None:
    """Tie input and weight, of shape (out, in / groups, *kernel); return the ids of the filters."""
    out, into = tracker.along(weight, 0), tracker.along(weight, 1)
    if groups == 1:
        tracker.tie(ids, into, "reads an input whose channels are fixed")
        return out
    for whole in (
        ids,
        out,
    ):  # the number of groups is derived from the channels: every group keeps the same ones
        if whole is not None:
            first = tracker.tie_across(whole.view(groups, -1))
            if whole is ids:
                tracker.tie(first, into)
    return out


def _register_macs(call: OperatorCall, weight: Tensor, out: Ids | None, tracker: Tracker) -> None:
    first, second = tracker.along(weight, 0), tracker.along(weight, 1)
    fixed = prod(n for n, ids in zip(weight.shape[:2], (first, second), strict=True) if ids is None)
    layer = tracker.register_filters(out) or call.module
    positions = call.out.shape[0] * prod(call.out.shape[2:])
    tracker.cost(layer, positions * prod(weight.shape[2:]) * fixed, first, second)


@rule_by_name("torchvision::roi_align", "torchvision::roi_pool")
def pool_regions(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the channels of (n, c, h, w) in (regions, c, height, width); the coordinates are pinned."""
    source, regions = call.args[:2]
    tracker.pin_all([regions], REGIONS)
    for dim in (2, 3):
        tracker.pin(tracker.along(source, dim), "is pooled or resampled along its channels")
    for out in call.outputs:
        tracker.label(out, [(), tracker.labels(source)[1], (), ()])


@rule_by_name("torchvision::nms")
def suppress(call: OperatorCall, tracker: Tracker) -> None:
    """Pin boxes and scores; the result is indices."""
    tracker.pin_all(call.tensors, REGIONS)
