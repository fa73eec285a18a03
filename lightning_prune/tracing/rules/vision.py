"""Rules of torchvision's operators: deformable convolution, pooling of regions, suppression of boxes.

They are registered by name, since torchvision may be absent or imported later.
"""

from __future__ import annotations

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.rules.contractions import register_convolution_macs, tie_grouped
from lightning_prune.tracing.rules.normalization import RESAMPLED
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
    tie_grouped(ids, weight, groups, tracker)
    out, batch_labels = tracker.along(weight, 0), tracker.labels(source)[0]
    tracker.tie(tracker.along(bias, 0), out)
    tracker.label(call.out, [batch_labels, () if out is None else (out,), (), ()])
    register_convolution_macs(call, out, list(batch_labels[:1]), tracker)


@rule_by_name("torchvision::roi_align", "torchvision::roi_pool")
def pool_regions(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the channels of (n, c, h, w) in (regions, c, height, width); the coordinates are pinned."""
    source, regions = call.args[:2]
    tracker.pin_all([regions], REGIONS)
    for dim in (2, 3):
        tracker.pin(tracker.along(source, dim), RESAMPLED)
    for out in call.outputs:
        tracker.label(out, [(), tracker.labels(source)[1], (), ()])


@rule_by_name("torchvision::nms")
def suppress(call: OperatorCall, tracker: Tracker) -> None:
    """Pin boxes and scores; the result is indices."""
    tracker.pin_all(call.tensors, REGIONS)
