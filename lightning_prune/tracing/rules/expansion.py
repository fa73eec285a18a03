"""Operators that make dimensions from sizes: repeated elements, and tensors made from nothing (level 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.rules.arguments import sizes
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.rules.splitting import equal_parts
from lightning_prune.tracing.traced_int import Attribute, Size, TensorSize, TracedInt, leaves
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


@rule(aten.expand, aten.broadcast_to, aten.expand_copy)
def expand(call: OperatorCall, tracker: Tracker) -> None:
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
        ids = tracker.sizes.get(source.key) if isinstance(source, TensorSize) else None
        if isinstance(size, TracedInt) and any(isinstance(leaf, Attribute) for leaf in leaves(size)):
            ids = tracker.ties.fresh(int(size))
            tracker.use(size, ids)
        labels.append((ids,) if ids is not None and len(ids) == size else ())
    return labels


@rule(
    aten.zeros, aten.ones, aten.full, aten.rand, aten.randn, aten.empty,
    aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
)  # fmt: skip
def factory(call: OperatorCall, tracker: Tracker) -> None:
    """A tensor made from sizes."""
    tracker.label(call.out, _sized(sizes(call, list(call.out.shape)), tracker))


@rule(aten.repeat)
def repeat(call: OperatorCall, tracker: Tracker) -> None:
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
