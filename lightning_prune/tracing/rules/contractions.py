"""Rules of operators that sum over channels (convolutions, matrix products, einsum, attention), and their MACs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.einsum import parse_contraction
from lightning_prune.tracing.ids import Ids, first_places
from lightning_prune.tracing.rules.arguments import passed_argument
from lightning_prune.tracing.rules.decisions import as_in_dense
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten
FIXED_INPUT = "reads an input whose channels are fixed"


@rule(aten.convolution, aten._convolution)
def convolution(call: OperatorCall, tracker: Tracker) -> None:
    """Follow plain, grouped, depthwise and transposed convolutions with any number of spatial dimensions."""
    source, weight, bias, transposed, groups = (*call.args[:3], call.args[6], call.args[8])
    spatial = range(2 - weight.dim(), 0)
    batched = source.dim() == weight.dim()
    tie_channels = _tie_transposed if transposed else _tie_plain
    out_ids = tie_channels(call, source.dim() - len(spatial) - 1, groups, tracker)
    # A kernel or stride of 1 leaves the positions apart: they may be channels, too.
    mixed = [weight.shape[dim] > 1 or call.out.shape[dim] != source.shape[dim] for dim in spatial]
    for dim in spatial:
        if mixed[dim]:
            tracker.pin(tracker.along(source, dim), "is convolved along its channels")
    if bias is not None:
        tracker.tie(tracker.along(bias, 0), out_ids)
    batch_labels = [tracker.labels(source)[0]] if batched else []
    position_labels = [() if mixed[dim] else tracker.labels(source)[dim] for dim in spatial]
    tracker.label(call.out, [*batch_labels, (out_ids,) if out_ids is not None else (), *position_labels])
    # Channels may be folded into the batch.
    positions = [ids[0] for ids in (*batch_labels, *position_labels) if ids]
    register_convolution_macs(call, out_ids, positions, tracker, transposed)


def register_convolution_macs(
    call: OperatorCall, out_ids: Ids | None, positions: list[Ids], tracker: Tracker, transposed: bool = False
) -> None:
    """Register positions * kernel * channels along both dimensions of the weight.

    Args:
        call: a convolution of (input, weight, ...).
        out_ids: ids of the result's channels.
        positions: ids along the batch and spatial dimensions that carry channels.
        tracker: receives the cost.
        transposed: whether the weight has shape (in, out / groups, *kernel), and not (out, in / groups, *kernel).
    """
    source, weight = call.args[:2]
    first, second = tracker.along(weight, 0), tracker.along(weight, 1)
    fixed = prod(n for n, ids in zip(weight.shape[:2], (first, second), strict=True) if ids is None)
    spatial = (source if transposed else call.out).shape[2 - weight.dim() :]
    batch = source.shape[0] if source.dim() == weight.dim() else 1
    # Positions that carry channels are factors of the cost, not part of its constant scale.
    scale = batch * prod(spatial) // prod(len(ids) for ids in positions)
    filters = second if transposed else first
    layer = tracker.register_filters(out_ids) or tracker.register_filters(filters) or call.module
    tracker.cost(layer, scale * prod(weight.shape[2:]) * fixed, first, second, *positions)


def _tie_plain(call: OperatorCall, channel_dim: int, groups: int, tracker: Tracker) -> Ids | None:
    """Tie input and weight, of shape (out, in / groups, *kernel); return the ids of the result's channels."""
    source, weight = call.args[:2]
    ids = tracker.along(source, channel_dim)
    out, into = tracker.along(weight, 0), tracker.along(weight, 1)
    if as_in_dense("plain", groups == 1, tracker):
        tracker.tie(ids, into, FIXED_INPUT)
    elif as_in_dense("depthwise", weight.shape[1] == 1, tracker):
        _tie_depthwise(call, ids, out, groups, tracker)
    else:
        tie_grouped(ids, weight, groups, tracker)
    return out


def tie_grouped(ids: Ids | None, weight: Tensor, groups: int, tracker: Tracker) -> None:
    """Tie input and weight, of shape (out, in / groups, *kernel), so that every group keeps the same channels."""
    tracker.tie(_tie_groups(ids, groups, tracker), tracker.along(weight, 1), FIXED_INPUT)
    _tie_groups(tracker.along(weight, 0), groups, tracker)


def _tie_transposed(call: OperatorCall, channel_dim: int, groups: int, tracker: Tracker) -> Ids | None:
    """Tie input and weight, of shape (in, out / groups, *kernel); return the ids of the result's channels."""
    source, weight = call.args[:2]
    ids = tracker.along(source, channel_dim)
    into, out = tracker.along(weight, 0), tracker.along(weight, 1)
    tracker.tie(ids, into, FIXED_INPUT)
    if as_in_dense("plain", groups == 1, tracker) or out is None:
        return out
    if not as_in_dense("depthwise", weight.shape[0] == groups, tracker):
        _tie_groups(into, groups, tracker)
        return out.repeat(groups)
    if not as_in_dense("single", weight.shape[1] == 1, tracker):
        tracker.pin(into, "has several filters in its group of a transposed convolution")
        return out.repeat(groups)
    if into is not None:
        tracker.require_size(_passed_groups(call, groups), into)
    return into


def _passed_groups(call: OperatorCall, groups: int) -> int:
    """Return the number of groups as Python passed it; ``groups`` if it was not passed."""
    passed = passed_argument(call, 6, "groups")  # the same position in conv2d and conv_transpose2d
    return passed if isinstance(passed, int) and not isinstance(passed, bool) else groups


def _tie_depthwise(
    call: OperatorCall, ids: Ids | None, out: Ids | None, groups: int, tracker: Tracker
) -> None:
    """Tie each input channel to its own filters; the number of groups must equal the number of channels."""
    if out is None:
        tracker.pin(ids, "meets a depthwise weight of fixed size")
        return
    # With a multiplier, each input channel has several filters in a row.
    channels = tracker.tie_across(out.view(groups, -1).t())
    tracker.tie(ids, channels, FIXED_INPUT)
    tracker.require_size(_passed_groups(call, groups), channels)


def _tie_groups(ids: Ids | None, groups: int, tracker: Tracker) -> Ids | None:
    """Tie the groups, so that every group keeps the same positions; return the ids of the first group."""
    return None if ids is None else tracker.tie_across(ids.view(groups, -1))


@rule(aten.mm, aten.bmm, aten.baddbmm, aten.addmm, aten.addbmm, aten.mv, aten.dot, aten.vdot, aten.addmv)
def product(call: OperatorCall, tracker: Tracker) -> None:
    """Follow matrix products, with or without a batch dimension and an added tensor."""
    has_addend = call.op._opname.startswith(("add", "badd"))
    left, right = call.args[1:3] if has_addend else call.args[:2]
    summed_dim = 0 if right.dim() == 1 else -2
    tracker.tie(tracker.along(left, -1), tracker.along(right, summed_dim), FIXED_INPUT)
    labels = _product_labels(left, right, tracker)
    tracker.label(call.out, labels)
    layer = ""
    if left.dim() == 2 and labels[0]:
        layer = tracker.register_filters(labels[0][0])
    if right.dim() > 1 and labels[-1]:
        layer = tracker.register_filters(labels[-1][0]) or layer
    _register_product_macs(layer or call.module, left, right, tracker)
    if has_addend:
        _tie_addend(call.args[0], call.out, tracker)


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


def _register_product_macs(layer: str, left: Tensor, right: Tensor, tracker: Tracker) -> None:
    """Register the product of all dimensions of ``left`` and the last one of a matrix ``right``."""
    dims = [(left, dim) for dim in range(left.dim())]
    if right.dim() > 1:
        dims.append((right, right.dim() - 1))
    scales, factors = zip(*(cost_factors(tensor, dim, tracker) for tensor, dim in dims), strict=True)
    tracker.cost(layer, prod(scales), *chain(*factors))


def cost_factors(tensor: Tensor, dim: int, tracker: Tracker) -> tuple[int, list[Ids]]:
    """Return a scale and id arrays whose remaining numbers, multiplied, are the remaining size of a dimension.

    A dimension that several were merged into, as in ``weight.view(num_kernels, -1)``, has a factor for each of them;
    if it does not have each combination of their ids equally often, all but the first array are pinned.
    """
    arrays = tracker.labels(tensor)[dim]
    if len(arrays) > 1:
        distinct = [ids[first_places(ids)] for ids in arrays]
        combination = torch.zeros_like(arrays[0])
        for array, values in zip(arrays, distinct, strict=True):
            combination = combination * len(values) + array.unique(return_inverse=True)[1]
        counts = combination.bincount(minlength=prod(map(len, distinct)))
        if int(counts.min()) == int(counts.max()):
            return int(counts[0]), distinct
    ids = tracker.along(tensor, dim)
    return (tensor.shape[dim], []) if ids is None else (1, [ids])


@rule(aten._grouped_mm)
def grouped_product(call: OperatorCall, tracker: Tracker) -> None:
    """Follow the products of experts: tokens (n, k), in groups, times one matrix per group, (groups, k, m)."""
    left, right = call.args[:2]
    if left.dim() != 2 or right.dim() != 3:
        tracker.pin_all(call.tensors, "meets a grouped product of another form than tokens times experts")
        return
    tracker.tie(tracker.along(left, 1), tracker.along(right, 1), FIXED_INPUT)
    _require_aligned_rows(left, 1, tracker)
    _require_aligned_rows(right, 2 if right.stride(2) == 1 else 1, tracker)
    tracker.label(call.out, [tracker.labels(left)[0], tracker.labels(right)[2]])
    out = tracker.along(right, 2)
    factors = [tracker.along(left, 0), tracker.along(left, 1), out]
    fixed = prod(n for n, ids in zip((*left.shape, right.shape[2]), factors, strict=True) if ids is None)
    tracker.cost(tracker.register_filters(out) or call.module, fixed, *factors)


def _require_aligned_rows(matrix: Tensor, dim: int, tracker: Tracker) -> None:
    """Require that the rows of a matrix, along ``dim``, begin at multiples of 16 bytes, in 16-bit types as well."""
    size, aligned = matrix.shape[dim], 16 // matrix.element_size()
    tracker.require_multiple(tracker.along(matrix, dim), aligned if size % 8 else max(aligned, 8))


def _tie_addend(addend: Tensor, out: Tensor, tracker: Tracker) -> None:
    for dim in range(1, addend.dim() + 1):
        if addend.shape[-dim] > 1 or addend.shape[-dim] == out.shape[-dim]:
            tracker.tie(tracker.along(addend, -dim), tracker.along(out, -dim))


@rule(aten.einsum)
def einsum(call: OperatorCall, tracker: Tracker) -> None:
    """Follow a contraction of two tensors: dimensions with the same letter are tied."""
    equation = parse_contraction(call.args[0])
    assert equation is not None  # any other einsum is recorded as the operators that torch makes of it
    left, right, out = equation
    labels: dict[str, tuple[Ids, ...]] = {}
    shape: dict[str, int] = {}
    for operand, tensor in zip((left, right), call.args[1], strict=False):
        shape |= dict(zip(operand, tensor.shape, strict=True))
        for dim, letter in enumerate(operand):
            if letter in labels:
                labels[letter] = _tie_letter(labels[letter], tensor, dim, tracker)
            else:
                labels[letter] = tracker.labels(tensor)[dim]
    tracker.label(call.out, [labels[letter] for letter in out])
    unshared = [letter for letter in out if (letter in left) != (letter in right)]
    filters = _filters_of(unshared, labels, tracker)
    layers = [tracker.register_filters(ids) for ids in filters]
    factors = [arrays[0] for arrays in labels.values() if arrays]
    fixed = prod(shape[letter] for letter, arrays in labels.items() if not arrays)
    tracker.cost(next(filter(None, layers), call.module), fixed, *factors)


def _filters_of(
    unshared: Sequence[str], labels: Mapping[str, tuple[Ids, ...]], tracker: Tracker
) -> list[Ids]:
    """Return the ids of the letters that are filters: those of a weight that has only one such letter.

    Of a mixture of kernels (``"bk,koihw->boihw"``), the convolution that reads it shows which letter has the filters.
    """
    ids_of = [labels[letter][0] for letter in unshared if labels[letter]]
    origins = [tracker.origin(ids) for ids in ids_of]
    names = Counter(origin.name for origin in origins if origin is not None)
    return [
        ids for ids, origin in zip(ids_of, origins, strict=True) if origin is None or names[origin.name] == 1
    ]


def _tie_letter(labels: tuple[Ids, ...], tensor: Tensor, dim: int, tracker: Tracker) -> tuple[Ids, ...]:
    """Tie the first operand's labels of a letter to the second operand ``tensor``; return the common labels."""
    for extra in labels[1:]:
        tracker.pin(extra, "two prunable dimensions were merged into one")
    ids, first = tracker.along(tensor, dim), labels[0] if labels else None
    tracker.tie(first, ids, FIXED_INPUT)
    return labels[:1] or (() if ids is None else (ids,))


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable, aten.scaled_dot_product_attention,
)  # fmt: skip
def attention(call: OperatorCall, tracker: Tracker) -> None:
    """Follow fused attention of queries, keys and values of shape (batch, heads, length, width).

    The result has the heads of all three and the width of the values.
    """
    query, key, value = call.args[:3]
    tracker.tie(tracker.along(query, -1), tracker.along(key, -1))
    for other, name in ((key, "single key head"), (value, "single value head")):
        _tie_heads(query, other, name, tracker)
    for mask in call.tensors[3:4]:
        if mask.dim() > 2 and mask.shape[-3] > 1:
            tracker.tie(tracker.along(query, -3), tracker.along(mask, -3))
    if call.arg("scale") is None:  # torch divides by the square root of the width
        tracker.pin(tracker.along(query, -1), "is a head's width, on which the softmax's scale depends")
    out = call.outputs[0]
    labels: list[tuple[Ids, ...]] = [() for _ in out.shape]
    labels[-3], labels[-1] = tracker.labels(query)[-3], tracker.labels(value)[-1]
    tracker.label(out, labels)
    pairs = query.shape[-2] * key.shape[-2] * prod(query.shape[:-3])
    _register_attention_macs(call, pairs, query, query, tracker)
    _register_attention_macs(call, pairs, query, value, tracker)


def _tie_heads(query: Tensor, other: Tensor, name: str, tracker: Tracker) -> None:
    """Tie each head of keys or values to the queries' heads that read it: one, or a group of equal size.

    A single head that all queries read restricts none of them.
    """
    if query.dim() < 3:
        return
    heads, num_heads, num_others = tracker.along(query, -3), query.shape[-3], other.shape[-3]
    if as_in_dense(name, num_others == 1 < num_heads, tracker):
        return
    if heads is not None and num_heads != num_others:
        heads = tracker.tie_across(heads.view(num_others, -1).t()).contiguous()
    tracker.tie(heads, tracker.along(other, -3))


def _register_attention_macs(
    call: OperatorCall, pairs: int, query: Tensor, wide: Tensor, tracker: Tracker
) -> None:
    """Register pairs of positions * heads * width, where ``wide`` is the tensor with that width."""
    heads, width = tracker.along(query, -3), tracker.along(wide, -1)
    fixed = (query.shape[-3] if heads is None else 1) * (wide.shape[-1] if width is None else 1)
    tracker.cost(call.module, pairs * fixed, heads, width)
