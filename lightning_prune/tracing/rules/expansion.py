"""Rules of operators that make dimensions from sizes: expand, repeat, and tensors created from sizes."""

from __future__ import annotations

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.rules.arguments import labels_from_sizes, passed_sizes
from lightning_prune.tracing.rules.decisions import as_in_dense
from lightning_prune.tracing.rules.registry import rule
from lightning_prune.tracing.rules.splitting import tie_equal_parts
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten


@rule(aten.expand, aten.broadcast_to, aten.expand_copy)
def expand(call: OperatorCall, tracker: Tracker) -> None:
    """Keep the ids of unchanged dimensions; give an expanded dimension the ids that its size was read from."""
    source, out = call.args[0], call.out
    lead = out.dim() - source.dim()
    passed = passed_sizes(call, list(out.shape))
    labels = labels_from_sizes(passed[:lead], tracker)
    for dim, arrays in enumerate(tracker.labels(source)):
        expanded = _is_expanded(source.shape[dim], out.shape[lead + dim], tracker)
        if not expanded and arrays:
            tie_equal_parts(arrays[0][None], passed[lead + dim], tracker)
        labels.append(labels_from_sizes([passed[lead + dim]], tracker)[0] if expanded else arrays)
    tracker.label(out, labels)


def _is_expanded(before: int, after: int, tracker: Tracker) -> bool:
    """Return whether one element is repeated; after a cut, there may be a single channel left to repeat it for."""
    expanded = as_in_dense("expanded", before == 1 and after > 1, tracker)
    return before == 1 and expanded


@rule(
    aten.zeros, aten.ones, aten.full, aten.rand, aten.randn, aten.empty,
    aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
)  # fmt: skip
def factory(call: OperatorCall, tracker: Tracker) -> None:
    """Label a tensor created from sizes."""
    if call.op._opname in ("ones", "full", "new_ones", "new_full"):
        tracker.mark_constant(call.out)
    tracker.label(call.out, labels_from_sizes(passed_sizes(call, list(call.out.shape)), tracker))


@rule(aten.repeat)
def repeat(call: OperatorCall, tracker: Tracker) -> None:
    """Repeat the ids; give a dimension that repeats one element the ids that the number of copies was read from."""
    source, repeats = call.args[0], call.args[1]
    lead = len(repeats) - source.dim()
    passed = passed_sizes(call, repeats)
    labels = labels_from_sizes(passed[:lead], tracker)
    for dim, (copies, arrays) in enumerate(zip(repeats[lead:], tracker.labels(source), strict=True)):
        if _is_expanded(source.shape[dim], copies, tracker):
            labels += labels_from_sizes([passed[lead + dim]], tracker)
        else:
            labels.append(tuple(ids.repeat(copies) for ids in arrays))
    tracker.label(call.out, labels)
