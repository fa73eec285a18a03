"""Rules of operators that move channels into positions and back, or change the order of channels by groups."""

from __future__ import annotations

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


@rule(aten.pixel_shuffle)
def pixel_shuffle(call: OperatorCall, tracker: Tracker) -> None:
    """Follow (c * r * r, h, w) -> (c, h * r, w * r): the r * r channels of a pixel are removed together."""
    _merge_channels(call, -3, call.args[1] ** 2, tracker)


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(call: OperatorCall, tracker: Tracker) -> None:
    """Follow (c, h * r, w * r) -> (c * r * r, h, w)."""
    _split_channels(call, -3, call.args[1] ** 2, tracker)


@rule(aten.im2col)
def im2col(call: OperatorCall, tracker: Tracker) -> None:
    """Follow (n, c, h, w) -> (n, c * kernel, positions)."""
    kernel = call.args[1]
    _split_channels(call, 1, kernel[0] * kernel[1], tracker)


@rule(aten.col2im)
def col2im(call: OperatorCall, tracker: Tracker) -> None:
    """Follow (n, c * kernel, positions) -> (n, c, h, w)."""
    kernel = call.args[2]
    _merge_channels(call, 1, kernel[0] * kernel[1], tracker)


def _merge_channels(call: OperatorCall, dim: int, factor: int, tracker: Tracker) -> None:
    """Tie each ``factor`` neighbouring channels, which become one."""
    ids = tracker.along(call.args[0], dim)
    merged = None if ids is None else tracker.tie_across(ids.view(-1, factor).t()).contiguous()
    _label_channels(call, dim, merged, tracker)


def _split_channels(call: OperatorCall, dim: int, factor: int, tracker: Tracker) -> None:
    """Repeat the id of each channel, which becomes ``factor`` neighbouring ones."""
    ids = tracker.along(call.args[0], dim)
    _label_channels(call, dim, None if ids is None else ids.repeat_interleave(factor), tracker)


def _label_channels(call: OperatorCall, dim: int, ids: Ids | None, tracker: Tracker) -> None:
    """Label the result with new ids along ``dim``, the old labels before it, and none after it."""
    source, out = call.args[0], call.out
    channel_dim = dim % source.dim()
    labels: list[tuple[Ids, ...]] = [*tracker.labels(source)[:channel_dim], *[()] * (out.dim() - channel_dim)]
    labels[channel_dim] = () if ids is None else (ids,)
    tracker.label(out, labels)


@rule(aten.unfold)
def unfold(call: OperatorCall, tracker: Tracker) -> None:
    """Pin ids along the dimension that is cut into windows, whose contents form a new last dimension."""
    labels = list(tracker.labels(call.args[0]))
    dim = call.arg("dimension")
    for ids in labels[dim]:
        tracker.pin(ids, "is cut into windows along its channels")
    labels[dim] = ()
    tracker.label(call.out, [*labels, ()])


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(call: OperatorCall, tracker: Tracker) -> None:
    """Follow channels (g, k) -> (k, g); every group keeps the same positions."""
    source, groups = call.args
    ids = tracker.along(source, 1)
    labels = list(tracker.labels(source))
    if ids is not None:
        grid = ids.view(groups, -1)
        tracker.tie_across(grid)
        labels[1] = (grid.t().flatten(),)
    tracker.label(call.out, labels)
