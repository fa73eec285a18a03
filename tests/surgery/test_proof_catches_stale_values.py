"""Faults in what must follow a cut: stale caches, branches that were skipped, numbers from sizes, grouped heads.

Each fault takes away what the trace does about it; the proof must refuse every wrong cut by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.graph import trace as tracing
from lightning_prune.surgery import prune as surgery
from lightning_prune.tracing import recorder
from lightning_prune.tracing.rules import contractions
from lightning_prune.tracing.tracker import Tracker
from tests.support.mutation_trials import EXAMPLE, Fault, check_caught, check_right
from tests.support.mutations import patched, relabelled
from tests.support.stale_networks import (
    ATTENDED,
    BRANCHES,
    CACHED_WIDTH,
    DIVIDED,
    FUSED_QUERIES,
    HALVED_ONCE,
    QUERIES,
    RANGED,
    SCALED_ONCE,
)

aten = torch.ops.aten


def _run_before(check: Callable[..., Any]) -> Callable[..., Any]:
    """Run the network between the trace and the cut, so that it keeps what it computes."""

    def run(model: nn.Module, *args: Any) -> Any:
        model(EXAMPLE)
        return check(model, *args)

    return run


def _no_layers(right: Any) -> Callable[..., list[str]]:
    return lambda tracker: []


def _cached(right: Any) -> Callable[..., Any]:
    return lambda model: contextlib.nullcontext()


def _tiled_heads(right: Any) -> Callable[..., Any]:
    """Let query head ``i`` read key head ``i % 2`` instead of ``i // 2``."""

    def tie(query: Any, other: Any, name: str, tracker: Any) -> None:
        heads = tracker.along(query, -3)
        if heads is None or query.shape[-3] == other.shape[-3]:
            right(query, other, name, tracker)
            return
        groups = tracker.tie_across(heads.view(-1, other.shape[-3]))
        tracker.tie(groups.contiguous(), tracker.along(other, -3))

    return tie


def _tiled(call: Any, labels: Any) -> Any:
    """Repeat heads as ``abab``, where they are repeated as ``aabb``."""
    if call.args[0].dim() != 5 or call.out.dim() != 4:
        return labels
    return [labels[0], [ids.view(2, 2).t().flatten() for ids in labels[1]], *labels[2:]]


between = patched(surgery, "_check", _run_before)
unmarked = patched(Tracker, "mark_float_use", lambda right: lambda self, size: None)
FAULTS = [
    Fault("stale cache of values", SCALED_ONCE, between),
    Fault("stale cache of a size", HALVED_ONCE, between),
    Fault(
        "skipped branch",
        BRANCHES,
        patched(tracing, "pin_unreached", _no_layers),
        examples=(EXAMPLE.abs(), -EXAMPLE.abs()),
    ),
    Fault("number from a size: tensor", DIVIDED, unmarked),
    Fault("number from a size: scale of attention", ATTENDED, unmarked),
    Fault("number from a size: range", RANGED, unmarked),
    Fault(
        "grouped queries tied to other heads, fused",
        FUSED_QUERIES,
        patched(contractions, "_tie_heads", _tiled_heads),
    ),
    Fault(
        "grouped queries tied to other heads, by hand",
        QUERIES,
        relabelled(aten.view, aten._unsafe_view, change=_tiled),
    ),
    Fault("stale value of lru_cache", CACHED_WIDTH, patched(recorder, "caches_bypassed", _cached)),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_wrong_cut_is_refused_and_rolled_back(fault: Fault) -> None:
    check_caught(fault)


@pytest.mark.parametrize("build", [DIVIDED, QUERIES, FUSED_QUERIES, CACHED_WIDTH, SCALED_ONCE, HALVED_ONCE])
def test_without_a_fault_every_cut_is_right(build: Callable[[], nn.Module]) -> None:
    check_right(build)
