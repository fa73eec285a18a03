"""Rules of operators that keep or reorder dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten

rule(
    aten.clone, aten.detach, aten.alias, aten._to_copy, aten.lift_fresh, aten.lift_fresh_copy,
    aten.contiguous, aten.native_dropout, aten.dropout, aten.empty_like, aten.feature_dropout,
    aten.feature_dropout_, aten.feature_alpha_dropout, aten.feature_alpha_dropout_, aten.zeros_like,
    aten.rand_like, aten.randn_like, aten.bernoulli, aten.bernoulli_, aten.exponential_, aten.geometric_,
    aten.log_normal_, aten.cauchy_, aten.random_, aten.zero_, aten.fill_, aten.uniform_, aten.normal_,
    aten._conj, aten.resolve_conj, aten.resolve_neg, aten.tril, aten.triu, aten.lift, aten.detach_,
    aten.requires_grad_,
)(same_labels)  # fmt: skip


@rule(aten.ones_like, aten.full_like)
def constant_like(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the labels; a sum of the result counts channels."""
    same_labels(call, tracker)
    tracker.mark_constant(call.out)


def _positive_dims(dims: int | Sequence[int], rank: int) -> list[int]:
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


@rule(aten.as_strided, aten.as_strided_)
def as_strided(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the labels if only the strides change, as where torch pools to one pixel; pin them otherwise."""
    if call.out.shape != call.args[0].shape:
        tracker.pin_all(call.tensors, "is viewed with other strides")
    same_labels(call, tracker)


@rule(aten.permute, aten.permute_copy)
def permute(call: OperatorCall, tracker: Tracker) -> None:
    """Reorder the dimensions."""
    labels = tracker.labels(call.args[0])
    tracker.label(call.out, [labels[dim] for dim in call.args[1]])


@rule(aten.transpose, aten.transpose_)
def transpose(call: OperatorCall, tracker: Tracker) -> None:
    """Swap two dimensions."""
    labels = list(tracker.labels(call.args[0]))
    if labels:
        first, second = call.arg("dim0"), call.arg("dim1")
        labels[first], labels[second] = labels[second], labels[first]
    tracker.label(call.out, labels)


@rule(aten.t, aten.numpy_T)
def t(call: OperatorCall, tracker: Tracker) -> None:
    """Reverse the dimensions."""
    tracker.label(call.out, tracker.labels(call.args[0])[::-1])


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(call: OperatorCall, tracker: Tracker) -> None:
    """Insert a dimension without ids."""
    labels = list(tracker.labels(call.args[0]))
    labels.insert(call.arg("dim") % (len(labels) + 1), ())
    tracker.label(call.out, labels)


@rule(aten.squeeze, aten.squeeze_)
def squeeze(call: OperatorCall, tracker: Tracker) -> None:
    """Drop dimensions of one element."""
    source = call.args[0]
    rank = source.dim()
    dims = _positive_dims(call.args[1], rank) if len(call.args) > 1 else list(range(rank))
    dropped = [dim for dim in dims if source.shape[dim] == 1]
    labels = tracker.labels(source)
    tracker.label(call.out, [ids for dim, ids in enumerate(labels) if dim not in dropped])


@rule(aten.flip)
def flip(call: OperatorCall, tracker: Tracker) -> None:
    """Reverse the ids along the flipped dimensions."""
    labels = list(tracker.labels(call.args[0]))
    for dim in _positive_dims(call.args[1], len(labels)):
        labels[dim] = tuple(ids.flip(0) for ids in labels[dim])
    tracker.label(call.out, labels)


@rule(aten.roll)
def roll(call: OperatorCall, tracker: Tracker) -> None:
    """Pin ids along rolled dimensions: among fewer channels, the same shift would give another order."""
    source = call.args[0]
    for dim in _positive_dims(call.arg("dims") or list(range(source.dim())), source.dim()):
        tracker.pin(tracker.along(source, dim), "is rolled along its channels")
    same_labels(call, tracker)


@rule(aten.rot90)
def rot90(call: OperatorCall, tracker: Tracker) -> None:
    """Pin ids along the two rotated dimensions, unless the rotation is a full turn."""
    source, quarter_turns = call.args[0], call.arg("k", 1)
    dims = _positive_dims(call.arg("dims", [0, 1]), source.dim())
    labels = list(tracker.labels(source))
    for dim in dims if quarter_turns % 4 else []:
        tracker.pin(tracker.along(source, dim), "is turned together with another dimension")
        labels[dim] = ()
    tracker.label(call.out, labels)
