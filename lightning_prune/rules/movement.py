"""Operators that move data: the ids take the same way (level 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.calls import Call
from lightning_prune.ids import Ids
from lightning_prune.rules.parts import equal_parts
from lightning_prune.rules.passed import Size, sizes
from lightning_prune.rules.registry import rule, same_labels
from lightning_prune.sizes import Attribute, Shape, TracedInt, leaves
from lightning_prune.tracker import Tracker

aten = torch.ops.aten

rule(
    aten.clone,
    aten.detach,
    aten.alias,
    aten._to_copy,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    aten.contiguous,
    aten.native_dropout,
    aten.dropout,
    aten.feature_dropout,
    aten.empty_like,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.bernoulli,
    aten.bernoulli_,
    aten.zero_,
    aten.fill_,
    aten.uniform_,
    aten.normal_,
    aten._conj,
    aten.resolve_conj,
    aten.resolve_neg,
    aten.tril,
    aten.triu,
    aten.lift,
    aten.detach_,
    aten.requires_grad_,
)(same_labels)


def _dims(dims: int | Sequence[int], rank: int) -> list[int]:
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


@rule(aten.as_strided, aten.as_strided_)
def as_strided(call: Call, tracker: Tracker) -> None:
    """Torch changes strides in place where it pools to one pixel; any other use could go anywhere."""
    if call.out.shape != call.args[0].shape:
        tracker.pin_all(call.tensors, "is viewed with strides of its own")
    same_labels(call, tracker)


@rule(aten.permute, aten.permute_copy)
def permute(call: Call, tracker: Tracker) -> None:
    """Reorder the dimensions."""
    labels = tracker.labels(call.args[0])
    tracker.label(call.out, [labels[dim] for dim in call.args[1]])


@rule(aten.transpose, aten.transpose_)
def transpose(call: Call, tracker: Tracker) -> None:
    """Swap two dimensions."""
    labels = list(tracker.labels(call.args[0]))
    if labels:
        first, second = call.arg("dim0"), call.arg("dim1")
        labels[first], labels[second] = labels[second], labels[first]
    tracker.label(call.out, labels)


@rule(aten.t, aten.numpy_T)
def t(call: Call, tracker: Tracker) -> None:
    """Reverse the dimensions."""
    tracker.label(call.out, tracker.labels(call.args[0])[::-1])


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(call: Call, tracker: Tracker) -> None:
    """A new dimension carries no ids."""
    labels = list(tracker.labels(call.args[0]))
    labels.insert(call.arg("dim") % (len(labels) + 1), ())
    tracker.label(call.out, labels)


@rule(aten.squeeze, aten.squeeze_)
def squeeze(call: Call, tracker: Tracker) -> None:
    """Drop dimensions of one element; a channel among them may not be the only one that is dropped."""
    source = call.args[0]
    rank = source.dim()
    dims = _dims(call.args[1], rank) if len(call.args) > 1 else list(range(rank))
    gone = [dim for dim in dims if source.shape[dim] == 1]
    labels = tracker.labels(source)
    tracker.label(call.out, [ids for dim, ids in enumerate(labels) if dim not in gone])


@rule(aten.expand, aten.broadcast_to, aten.expand_copy)
def expand(call: Call, tracker: Tracker) -> None:
    """Kept dimensions keep their ids; a dimension of new size takes those that its size was read from."""
    source, out = call.args[0], call.out
    lead = out.dim() - source.dim()
    passed = sizes(call, list(out.shape))
    labels = list(_sized(passed[:lead], tracker))
    for dim, ids in enumerate(tracker.labels(source)):
        grown = _grown(source.shape[dim], out.shape[lead + dim], tracker)
        if not grown and ids:
            equal_parts(ids[0][None], passed[lead + dim], tracker)
        labels.append(_sized([passed[lead + dim]], tracker)[0] if grown else ids)
    tracker.label(out, labels)


def _grown(before: int, after: int, tracker: Tracker) -> bool:
    """One element is repeated: as in the dense network, since there may be one channel left to repeat it for."""
    dense = tracker.before("grown")
    grown = before == 1 and (after > 1 if dense is None else bool(dense))
    tracker.decided("grown", grown)
    return grown


def _sized(passed: Sequence[Size], tracker: Tracker) -> list[tuple[Ids, ...]]:
    """Ids for dimensions that are made from a size: those of the dimension or attribute that it was read from."""
    labels: list[tuple[Ids, ...]] = []
    for size in passed:
        tracker.remember(size)
        source = size.expression if isinstance(size, TracedInt) else None
        ids = tracker.sizes.get(source.key) if isinstance(source, Shape) else None
        if isinstance(size, TracedInt) and any(isinstance(leaf, Attribute) for leaf in leaves(size)):
            ids = tracker.ties.fresh(int(size))
            tracker.use(size, ids)
        labels.append((ids,) if ids is not None and len(ids) == size else ())
    return labels


@rule(
    aten.zeros, aten.ones, aten.full, aten.rand, aten.randn, aten.empty,
    aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
)  # fmt: skip
def factory(call: Call, tracker: Tracker) -> None:
    """A tensor made from sizes."""
    tracker.label(call.out, _sized(sizes(call, list(call.out.shape)), tracker))


@rule(aten.copy_)
def copy_(call: Call, tracker: Tracker) -> None:
    """Writing into a tensor (or a view of it) ties what is written to what it overwrites."""
    target, source = call.args[0], call.args[1]
    lead = target.dim() - source.dim()
    for dim in range(source.dim()):
        if source.shape[dim] > 1:
            tracker.tie(tracker.along(target, lead + dim), tracker.along(source, dim))
    tracker.label(call.out, tracker.labels(target))


@rule(aten.cat, aten.concat)
def cat(call: Call, tracker: Tracker) -> None:
    """Ids one after the other along the dimension; tied along all others."""
    tensors = [tensor for tensor in call.args[0] if not (tensor.dim() == 1 and tensor.shape[0] == 0)]
    rank = call.out.dim()
    at = (call.arg("dim") or 0) % rank
    labels: list[list[Ids]] = [[] for _ in range(rank)]
    for dim in range(rank):
        arrays = [tracker.along(tensor, dim) for tensor in tensors]
        if any(ids is not None for ids in arrays):
            lengths = [tensor.shape[dim] for tensor in tensors]
            joined = _concatenated(arrays, lengths, tracker) if dim == at else _tied(arrays, lengths, tracker)
            labels[dim].append(joined)
    tracker.label(call.out, labels)


@rule(aten.stack)
def stack(call: Call, tracker: Tracker) -> None:
    """Tied along all dimensions but the new one."""
    tensors, rank = call.args[0], call.out.dim()
    at = (call.arg("dim") or 0) % rank
    labels: list[tuple[Ids, ...]] = []
    for dim in range(rank - 1):
        arrays = [tracker.along(tensor, dim) for tensor in tensors]
        known = any(ids is not None for ids in arrays)
        labels.append((_tied(arrays, [t.shape[dim] for t in tensors], tracker),) if known else ())
    labels.insert(at, ())
    tracker.label(call.out, labels)


def _concatenated(arrays: Sequence[Ids | None], lengths: Sequence[int], tracker: Tracker) -> Ids:
    parts = []
    for ids, length in zip(arrays, lengths, strict=True):
        parts.append(_fixed(length, tracker) if ids is None else ids)
    return torch.cat(parts)


def _fixed(length: int, tracker: Tracker) -> Ids:
    """Ids for channels that no parameter owns: they always stay."""
    ids = tracker.ties.fresh(length)
    tracker.pin(ids, "belongs to a tensor of fixed size")
    return ids


def _tied(arrays: Sequence[Ids | None], lengths: Sequence[int], tracker: Tracker) -> Ids:
    first = next(ids for ids in arrays if ids is not None)
    for ids in arrays:
        tracker.tie(first, ids)
    return first


@rule(aten.flip)
def flip(call: Call, tracker: Tracker) -> None:
    """Ids in reverse."""
    labels = list(tracker.labels(call.args[0]))
    for dim in _dims(call.args[1], len(labels)):
        labels[dim] = tuple(ids.flip(0) for ids in labels[dim])
    tracker.label(call.out, labels)


@rule(aten.roll)
def roll(call: Call, tracker: Tracker) -> None:
    """A shift by a constant is only the same shift for the channels that stay if all of them do."""
    source = call.args[0]
    for dim in _dims(call.arg("dims") or list(range(source.dim())), source.dim()):
        tracker.pin(tracker.along(source, dim), "is rolled along its channels")
    same_labels(call, tracker)


@rule(aten.rot90)
def rot90(call: Call, tracker: Tracker) -> None:
    """A turn of two dimensions; channels may not be among them."""
    source, times, dims = call.args[0], call.arg("k", 1), _dims(call.arg("dims", [0, 1]), call.args[0].dim())
    labels = list(tracker.labels(source))
    for dim in dims if times % 4 else []:
        tracker.pin(tracker.along(source, dim), "is turned together with another dimension")
        labels[dim] = ()
    tracker.label(call.out, labels)


@rule(aten.repeat)
def repeat(call: Call, tracker: Tracker) -> None:
    """Copies one after the other."""
    source, repeats = call.args[0], call.args[1]
    lead = len(repeats) - source.dim()
    passed = sizes(call, repeats)
    labels = [*_sized(passed[:lead], tracker)]
    for dim, (times, arrays) in enumerate(zip(repeats[lead:], tracker.labels(source), strict=True)):
        grown = _grown(source.shape[dim], times, tracker)
        labels.append(
            _sized([passed[lead + dim]], tracker)[0] if grown else tuple(ids.repeat(times) for ids in arrays)
        )
    tracker.label(call.out, labels)


@rule(aten.constant_pad_nd)
def pad(call: Call, tracker: Tracker) -> None:
    """Padding along channels adds channels of fixed number."""
    source, amounts = call.args[0], list(call.args[1])
    labels = list(tracker.labels(source))
    for back, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        ids = tracker.along(source, -back)
        if ids is not None and (before or after):
            labels[-back] = (_padded(ids, before, after, tracker),)
    tracker.label(call.out, labels)


@rule(aten.pad)
def pad_circular(call: Call, tracker: Tracker) -> None:
    """Padding with what is at the other end leaves the dimensions alone that are not padded."""
    source, amounts = call.args[0], list(call.args[1])
    labels = list(tracker.labels(source))
    for back, both in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if any(both):
            tracker.pin(tracker.along(source, -back), "is padded along its channels")
            labels[-back] = ()
    tracker.label(call.out, labels)


def _padded(ids: Ids, before: int, after: int, tracker: Tracker) -> Ids:
    if min(before, after) < 0:
        tracker.pin(ids, "is cropped by a padding of negative size")
    kept = ids[max(-before, 0) : len(ids) - max(-after, 0)]
    return torch.cat([_fixed(max(before, 0), tracker), kept, _fixed(max(after, 0), tracker)])


@rule(aten.pixel_shuffle)
def pixel_shuffle(call: Call, tracker: Tracker) -> None:
    """(c * r * r, h, w) -> (c, h * r, w * r): the r * r channels of a pixel live or die together."""
    _gathered(call, -3, call.args[1] ** 2, tracker)


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(call: Call, tracker: Tracker) -> None:
    """(c, h * r, w * r) -> (c * r * r, h, w)."""
    _scattered(call, -3, call.args[1] ** 2, tracker)


@rule(aten.im2col)
def im2col(call: Call, tracker: Tracker) -> None:
    """(n, c, h, w) -> (n, c * kernel, positions)."""
    kernel = call.args[1]
    _scattered(call, 1, kernel[0] * kernel[1], tracker)


@rule(aten.col2im)
def col2im(call: Call, tracker: Tracker) -> None:
    """(n, c * kernel, positions) -> (n, c, h, w)."""
    kernel = call.args[2]
    _gathered(call, 1, kernel[0] * kernel[1], tracker)


def _gathered(call: Call, dim: int, times: int, tracker: Tracker) -> None:
    source, out = call.args[0], call.out
    labels: list[tuple[Ids, ...]] = list(tracker.labels(source)[: out.dim()])
    labels += [()] * (out.dim() - len(labels))
    labels[dim:] = [()] * len(labels[dim:])
    ids = tracker.along(source, dim)
    if ids is not None:
        labels[dim] = (tracker.tie_across(ids.view(-1, times).t()).contiguous(),)
    tracker.label(out, labels)


def _scattered(call: Call, dim: int, times: int, tracker: Tracker) -> None:
    source, out = call.args[0], call.out
    at = dim % source.dim()
    labels: list[tuple[Ids, ...]] = [*tracker.labels(source)[:at], *[()] * (out.dim() - at)]
    ids = tracker.along(source, at)
    if ids is not None:
        labels[at] = (ids.repeat_interleave(times),)
    tracker.label(out, labels)


@rule(aten.unfold)
def unfold(call: Call, tracker: Tracker) -> None:
    """Windows along one dimension, their contents in a new last one."""
    labels = list(tracker.labels(call.args[0]))
    dim = call.arg("dimension")
    for ids in labels[dim]:
        tracker.pin(ids, "is cut into windows along its channels")
    labels[dim] = ()
    tracker.label(call.out, [*labels, ()])


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(call: Call, tracker: Tracker) -> None:
    """(g, k) channels become (k, g); each group keeps the same ones."""
    source, groups = call.args
    ids = tracker.along(source, 1)
    labels = list(tracker.labels(source))
    if ids is not None:
        grid = ids.view(groups, -1)
        tracker.tie_across(grid)
        labels[1] = (grid.t().flatten(),)
    tracker.label(call.out, labels)
