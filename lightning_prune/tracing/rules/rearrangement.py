"""Operators that trade channels for positions, or group them anew (level 1)."""

from __future__ import annotations

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


@rule(aten.pixel_shuffle)
def pixel_shuffle(call: OperatorCall, tracker: Tracker) -> None:
    """(c * r * r, h, w) -> (c, h * r, w * r): the r * r channels of a pixel live or die together."""
    _gathered(call, -3, call.args[1] ** 2, tracker)


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(call: OperatorCall, tracker: Tracker) -> None:
    """(c, h * r, w * r) -> (c * r * r, h, w)."""
    _scattered(call, -3, call.args[1] ** 2, tracker)


@rule(aten.im2col)
def im2col(call: OperatorCall, tracker: Tracker) -> None:
    """(n, c, h, w) -> (n, c * kernel, positions)."""
    kernel = call.args[1]
    _scattered(call, 1, kernel[0] * kernel[1], tracker)


@rule(aten.col2im)
def col2im(call: OperatorCall, tracker: Tracker) -> None:
    """(n, c * kernel, positions) -> (n, c, h, w)."""
    kernel = call.args[2]
    _gathered(call, 1, kernel[0] * kernel[1], tracker)


def _gathered(call: OperatorCall, dim: int, times: int, tracker: Tracker) -> None:
    """As many neighbouring channels become one."""
    ids = tracker.along(call.args[0], dim)
    one = None if ids is None else tracker.tie_across(ids.view(-1, times).t()).contiguous()
    _regrouped(call, dim, one, tracker)


def _scattered(call: OperatorCall, dim: int, times: int, tracker: Tracker) -> None:
    """Each channel becomes as many neighbouring ones."""
    ids = tracker.along(call.args[0], dim)
    _regrouped(call, dim, None if ids is None else ids.repeat_interleave(times), tracker)


def _regrouped(call: OperatorCall, dim: int, ids: Ids | None, tracker: Tracker) -> None:
    """New ids along ``dim``, nothing after it."""
    source, out = call.args[0], call.out
    at = dim % source.dim()
    labels: list[tuple[Ids, ...]] = [*tracker.labels(source)[:at], *[()] * (out.dim() - at)]
    labels[at] = () if ids is None else (ids,)
    tracker.label(out, labels)


@rule(aten.unfold)
def unfold(call: OperatorCall, tracker: Tracker) -> None:
    """Windows along one dimension, their contents in a new last one."""
    labels = list(tracker.labels(call.args[0]))
    dim = call.arg("dimension")
    for ids in labels[dim]:
        tracker.pin(ids, "is cut into windows along its channels")
    labels[dim] = ()
    tracker.label(call.out, [*labels, ()])


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(call: OperatorCall, tracker: Tracker) -> None:
    """(g, k) channels become (k, g); each group keeps the same ones."""
    source, groups = call.args
    ids = tracker.along(source, 1)
    labels = list(tracker.labels(source))
    if ids is not None:
        grid = ids.view(groups, -1)
        tracker.tie_across(grid)
        labels[1] = (grid.t().flatten(),)
    tracker.label(call.out, labels)
