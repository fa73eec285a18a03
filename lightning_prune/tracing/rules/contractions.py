"""Operators that sum over channels against a weight, and what they cost (level 1)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.einsum import letters
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import argument
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten
INPUT = "reads an input whose channels are fixed"


@rule(aten.convolution, aten._convolution)
def convolution(call: OperatorCall, tracker: Tracker) -> None:
    """Plain, grouped, depthwise and transposed convolutions in any number of dimensions."""
    source, weight, bias, transposed, groups = (*call.args[:3], call.args[6], call.args[8])
    spatial = weight.dim() - 2
    batched = source.dim() == weight.dim()
    follow = _transposed if transposed else _plain
    out_ids = follow(call, source.dim() - spatial - 1, groups, tracker)
    mixed = [weight.shape[dim] > 1 or call.out.shape[dim] != source.shape[dim] for dim in range(-spatial, 0)]
    for dim in range(-spatial, 0):
        if mixed[dim]:
            tracker.pin(tracker.along(source, dim), "is convolved along its channels")
    if bias is not None:
        tracker.tie(tracker.along(bias, 0), out_ids)
    lead = [tracker.labels(source)[0]] if batched else []
    along = [() if mixed[dim] else tracker.labels(source)[dim] for dim in range(-spatial, 0)]
    tracker.label(call.out, [*lead, (out_ids,) if out_ids is not None else (), *along])
    _weighted(call, out_ids, [ids[0] for ids in along if ids], tracker)


def _weighted(call: OperatorCall, out_ids: Ids | None, positions: list[Ids], tracker: Tracker) -> None:
    """MACs: positions * kernel * kept along both dimensions of the weight. Positions may be channels, too."""
    source, weight, transposed = call.args[0], call.args[1], call.args[6]
    first, second = tracker.along(weight, 0), tracker.along(weight, 1)
    fixed = prod(n for n, ids in zip(weight.shape[:2], (first, second), strict=True) if ids is None)
    spatial = (source if transposed else call.out).shape[2 - weight.dim() :]
    batch = source.shape[0] if source.dim() == weight.dim() else 1
    scale = batch * prod(spatial) // prod(len(ids) for ids in positions)
    layer = tracker.filter(out_ids) or tracker.filter(second if transposed else first) or call.module
    tracker.cost(layer, scale * prod(weight.shape[2:]) * fixed, first, second, *positions)


def _plain(call: OperatorCall, channel: int, groups: int, tracker: Tracker) -> Ids | None:
    """Weight (out, in / groups, ...): what its filters are tied to."""
    source, weight = call.args[:2]
    ids, out, into = tracker.along(source, channel), tracker.along(weight, 0), tracker.along(weight, 1)
    if _was("plain", groups == 1, tracker):
        tracker.tie(ids, into, INPUT)
    elif _was("depthwise", weight.shape[1] == 1, tracker):
        _depthwise(call, ids, out, groups, tracker)
    else:
        tracker.tie(_across(ids, groups, tracker), into, INPUT)
        _across(out, groups, tracker)
    return out


def _transposed(call: OperatorCall, channel: int, groups: int, tracker: Tracker) -> Ids | None:
    """Weight (in, out / groups, ...)."""
    source, weight = call.args[:2]
    ids, into, out = tracker.along(source, channel), tracker.along(weight, 0), tracker.along(weight, 1)
    tracker.tie(ids, into, INPUT)
    if _was("plain", groups == 1, tracker) or out is None:
        return out
    if not _was("depthwise", weight.shape[0] == groups, tracker):
        _across(into, groups, tracker)
        return out.repeat(groups)
    if not _was("single", weight.shape[1] == 1, tracker):
        tracker.pin(into, "has several filters in its group of a transposed convolution")
        return out.repeat(groups)
    if into is not None:
        passed = _groups(call)
        tracker.use(groups if passed is None else passed, into)
    return into


def _was(what: str, now: bool, tracker: Tracker) -> bool:
    """``now``, or what it was in the dense network: others may shrink to one channel for each group."""
    before = tracker.before(what)
    decision = now if before is None else bool(before)
    tracker.decided(what, decision)
    return decision


def _groups(call: OperatorCall) -> int | None:
    """The number of groups as the code passed it."""
    passed = argument(call, 6, "groups")  # the same place in conv2d and conv_transpose2d
    return passed if isinstance(passed, int) and not isinstance(passed, bool) else None


def _depthwise(call: OperatorCall, ids: Ids | None, out: Ids | None, groups: int, tracker: Tracker) -> None:
    """Each input channel has filters of its own; the number of groups must follow."""
    if out is None:
        tracker.pin(ids, "meets a depthwise weight of fixed size")
        return
    own = tracker.tie_across(out.view(groups, -1).t())
    tracker.tie(ids, own, INPUT)
    passed = _groups(call)
    tracker.use(passed if passed is not None else groups, own)


def _across(ids: Ids | None, groups: int, tracker: Tracker) -> Ids | None:
    """Every group keeps the same positions."""
    return None if ids is None else tracker.tie_across(ids.view(groups, -1))


@rule(aten.mm, aten.bmm, aten.baddbmm, aten.addmm, aten.addbmm, aten.mv, aten.dot, aten.vdot, aten.addmv)
def product(call: OperatorCall, tracker: Tracker) -> None:
    """Matrix products, batched or not, with or without something added."""
    added = call.op._opname.startswith(("add", "badd"))
    left, right = call.args[1:3] if added else call.args[:2]
    inner = tracker.along(left, -1)
    rows = 0 if right.dim() == 1 else -2
    tracker.tie(inner, tracker.along(right, rows), INPUT)
    labels = _product_labels(left, right, tracker)
    tracker.label(call.out, labels)
    layer = ""
    if left.dim() == 2 and labels[0]:
        layer = tracker.filter(labels[0][0])
    if right.dim() > 1 and labels[-1]:
        layer = tracker.filter(labels[-1][0]) or layer
    _product_cost(call, layer or call.module, left, right, tracker)
    if added:
        _add(call.args[0], call.out, tracker)


def _product_labels(left: Tensor, right: Tensor, tracker: Tracker) -> list[tuple[Ids, ...]]:
    labels: list[tuple[Ids, ...]] = []
    if left.dim() == 3:
        first, second = tracker.along(left, 0), tracker.along(right, 0)
        if left.shape[0] > 1:
            tracker.tie(first, second)
        labels.append(tracker.labels(left)[0] or tracker.labels(right)[0])
    if left.dim() > 1:
        labels.append(tracker.labels(left)[-2])
    if right.dim() > 1:
        labels.append(tracker.labels(right)[-1])
    return labels


def _product_cost(call: OperatorCall, layer: str, left: Tensor, right: Tensor, tracker: Tracker) -> None:
    dims = [(left, dim) for dim in range(left.dim())] + (
        [(right, right.dim() - 1)] if right.dim() > 1 else []
    )
    known = [tracker.along(tensor, dim) for tensor, dim in dims]
    fixed = prod(t.shape[d] for (t, d), ids in zip(dims, known, strict=True) if ids is None)
    tracker.cost(layer, fixed, *known)


def _add(bias: Tensor, out: Tensor, tracker: Tracker) -> None:
    for dim in range(1, bias.dim() + 1):
        if bias.shape[-dim] > 1 or bias.shape[-dim] == out.shape[-dim]:
            tracker.tie(tracker.along(bias, -dim), tracker.along(out, -dim))


@rule(aten.einsum)
def einsum(call: OperatorCall, tracker: Tracker) -> None:
    """A contraction of two tensors by letters, which live and die together wherever they stand."""
    equation = letters(call.args[0])
    assert equation is not None  # any other one is recorded as what torch makes of it
    along: dict[str, tuple[Ids, ...]] = {}
    shape: dict[str, int] = {}
    for each, tensor in zip(equation, call.args[1], strict=False):
        shape |= dict(zip(each, tensor.shape, strict=True))
        for dim, letter in enumerate(each):
            along[letter] = (
                _met(along[letter], tensor, dim, tracker) if letter in along else tracker.labels(tensor)[dim]
            )
    tracker.label(call.out, [along[letter] for letter in equation[2]])
    own = [letter for letter in equation[2] if (letter in equation[0]) != (letter in equation[1])]
    layers = [tracker.filter(along[letter][0]) for letter in own if along[letter]]
    known = [ids[0] for ids in along.values() if ids]
    fixed = prod(shape[letter] for letter, ids in along.items() if not ids)
    tracker.cost(next(filter(None, layers), call.module), fixed, *known)


def _met(before: tuple[Ids, ...], tensor: Tensor, dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    """The ids of a letter that both operands have."""
    for extra in before[1:]:
        tracker.pin(extra, "two prunable dimensions were merged into one")
    ids, first = tracker.along(tensor, dim), before[0] if before else None
    tracker.tie(first, ids, INPUT)
    return before[:1] or (() if ids is None else (ids,))


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable, aten.scaled_dot_product_attention,
)  # fmt: skip
def attention(call: OperatorCall, tracker: Tracker) -> None:
    """(b, heads, length, d) queries, keys and values; the last dimension of the values is the result's."""
    query, key, value = call.args[:3]
    for dim in (-3, -1):
        tracker.tie(tracker.along(query, dim), tracker.along(key, dim))
    tracker.tie(tracker.along(query, -3), tracker.along(value, -3))
    for mask in call.tensors[3:4]:
        if mask.dim() > 2 and mask.shape[-3] > 1:
            tracker.tie(tracker.along(query, -3), tracker.along(mask, -3))
    if call.arg("scale") is None:
        tracker.pin(tracker.along(query, -1), "is a head's width, on which the softmax's scale depends")
    out = call.outputs[0]
    labels: list[tuple[Ids, ...]] = [() for _ in out.shape]
    labels[-3], labels[-1] = tracker.labels(query)[-3], tracker.labels(value)[-1]
    tracker.label(out, labels)
    pairs = query.shape[-2] * key.shape[-2] * prod(query.shape[:-3])
    _attention_cost(call, pairs, query, query, tracker)
    _attention_cost(call, pairs, query, value, tracker)


def _attention_cost(call: OperatorCall, pairs: int, query: Tensor, deep: Tensor, tracker: Tracker) -> None:
    heads, depth = tracker.along(query, -3), tracker.along(deep, -1)
    fixed = (query.shape[-3] if heads is None else 1) * (deep.shape[-1] if depth is None else 1)
    tracker.cost(call.module, pairs * fixed, heads, depth)
