"""Prune one network with this package: trace, plan, a random cut, its proof, and the errors of both oracles."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lightning_prune.surgery.prune as surgery
from benchmarks.common.memory import peak_memory
from benchmarks.zoo.networks import Network
from lightning_prune import ChannelGraph, SurgeryError, prune_, trace
from lightning_prune.criteria import L2
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.select import select
from lightning_prune.testing import error, randomise_, with_dead_filters, with_zeroed_consumers

__all__ = [
    "HALF",
    "NO_LIMITS",
    "TOLERANCE",
    "VISIBLE",
    "Seconds",
    "Units",
    "awake_",
    "describe_failure",
    "lowest",
    "measure",
    "proof_timed",
    "random_half",
    "units_of",
    "verdict",
    "warm_up",
    "with_one_left",
    "without_refused",
]

Units = NDArray[np.int64]
ATTEMPTS = 6  # the first and five more
TOLERANCE = 1e-4
VISIBLE = 1e-2  # an oracle cannot judge a cut that changes the output by less
NEAR_ZERO = 1e-3
NO_LIMITS = Limits(layers=1.0)
HALF = {"macs": 0.5}


@dataclass
class Seconds:
    """Wall-clock and processor seconds by the name of the step."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Add the time of the block to ``step``."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[step] = self.wall.get(step, 0.0) + time.perf_counter() - wall
            self.cpu[step] = self.cpu.get(step, 0.0) + time.process_time() - cpu

    def of_rest(self, step: str, whole: str, part: str) -> None:
        """Replace the time of ``whole`` by its time without ``part``, named ``step``."""
        for times in (self.wall, self.cpu):
            times[step] = times.pop(whole, 0.0) - times.get(part, 0.0)


def measure(network: Network) -> dict[str, Any]:
    """Trace, plan, cut a random half, prove it and compare with both oracles; return the row of the network."""
    warm_up()
    torch.manual_seed(0)
    model = awake_(randomise_(network.build())).eval()
    dense = copy.deepcopy(model)
    example = torch.randn(1, 3, network.size, network.size)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        graph, remove = run_engine(model, example, row)
        row |= compare_with_oracles(dense, model, graph, remove, torch.randn(2, *example.shape[1:]))
    except Exception as failure:
        return {**row, **describe_failure(failure)}
    return {**row, "status": "proven"}


def awake_(model: nn.Module) -> nn.Module:
    """Give random values to weights and scales that start near zero, so that a cut changes the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() and parameter.abs().max() < NEAR_ZERO:
            wide = parameter.numel() > max(parameter.shape)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * parameter[0].numel() ** -0.5 if wide else noise.abs() + 0.5)
    return model


def warm_up() -> None:
    """Prune a tiny network, so that imports and caches of the first call are not part of the times."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    scores = L2()(graph, net, {})
    prune_(net, graph, select(graph, scores, HALF, limits=NO_LIMITS).remove)


def run_engine(model: nn.Module, example: Tensor, row: dict[str, Any]) -> tuple[ChannelGraph, Units]:
    """Trace, plan half of the MACs by magnitude, cut a random half and prove it.

    Results are added to ``row`` as soon as they exist, so that a row of a failure holds the steps before it.
    """
    seconds, refusals = Seconds(), list[str]()
    row |= {"wall": seconds.wall, "cpu": seconds.cpu, "retried": refusals}
    with peak_memory() as peak, proof_timed(seconds):
        with seconds.of("trace"):
            graph = trace(model, example)
        row |= {**units_of(graph), **_costs(graph, model, seconds)}
        try:
            remove = cut_with_retries(model, graph, refusals, seconds)
        finally:
            seconds.of_rest("surgery", "cut", "proof")
    row |= {"peak_mb": peak.megabytes, "removed": len(remove)}
    return graph, remove


def _costs(graph: ChannelGraph, model: nn.Module, seconds: Seconds) -> dict[str, Any]:
    """Return the share of MACs of a plan for half of them, and the lowest possible share."""
    if not len(graph.prunable):
        return {"share": 1.0, "lowest": 1.0}
    with seconds.of("plan"):
        scores = L2()(graph, model, {})
        plan = select(graph, scores, HALF, limits=NO_LIMITS, dense=DenseSizes.of(graph))
    macs = max(graph.cost("macs"), 1)
    return {"share": plan.costs["macs"].after / macs, "lowest": graph.cost("macs", lowest(graph)) / macs}


def units_of(graph: ChannelGraph) -> dict[str, Any]:
    """Return numbers of units, and why some are pinned, as a part of a row."""
    filters = np.unique(np.concatenate(list(graph.layers.values()) or [np.empty(0, np.int64)]))
    free = graph.prunable[~np.isin(graph.prunable, graph.statistics_units)]
    reasons: dict[str, int] = {}
    for unit, reason in graph.pinned.items():
        if unit <= filters.max(initial=-1):  # filters have the low numbers
            short = reason.split(" (")[0]
            reasons[short] = reasons.get(short, 0) + 1
    return {
        "units": len(filters),
        "prunable": len(graph.prunable),
        "free_of_statistics": len(free),
        "pinned_share": 1 - len(graph.prunable) / max(len(filters), 1),
        "pinned_reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])[:6]),
        "unsupported": {operator: where[:2] for operator, where in graph.unsupported.items()},
        "notes": graph.notes,
    }


def cut_with_retries(model: nn.Module, graph: ChannelGraph, refusals: list[str], seconds: Seconds) -> Units:
    """Cut a random half; if surgery refuses, pin its units and draw again, as the callback does.

    Each reason is appended to ``refusals``; the last refusal is raised after ``ATTEMPTS``.
    """
    while True:
        remove = random_half(graph)
        if not len(remove):
            raise SurgeryError(refusals[-1] if refusals else "nothing can be removed")
        try:
            with seconds.of("cut"):
                prune_(model, graph, remove)
            return remove
        except SurgeryError as failure:
            refusals.append(str(failure)[:300])
            if not len(failure.units) or len(refusals) == ATTEMPTS:
                raise
            graph = without_refused(graph, failure)


def without_refused(graph: ChannelGraph, refusal: SurgeryError) -> ChannelGraph:
    """Return the graph with the units of a refusal pinned, as the callback does."""
    pinned = dict.fromkeys(refusal.units.tolist(), f"surgery refused: {refusal}")
    return replace(graph, pinned={**pinned, **graph.pinned})


@contextmanager
def proof_timed(seconds: Seconds) -> Iterator[None]:
    """Add the time of each proof within the block to ``proof``."""
    prove = surgery.prove

    def timed(*args: Any, **kwargs: Any) -> None:
        with seconds.of("proof"):
            prove(*args, **kwargs)

    surgery.prove = timed
    try:
        yield
    finally:
        surgery.prove = prove


def random_half(graph: ChannelGraph) -> Units:
    """Return a random half of the prunable units, with at least one unit left in every dimension.

    Units that enter statistics across channels are left out, since oracles do not hold for them, unless there are
    no others.
    """
    free = graph.prunable[~np.isin(graph.prunable, graph.statistics_units)]
    free = free if len(free) else graph.prunable
    order = np.random.default_rng(0).permutation(graph.num_units)
    shuffled = order[np.isin(order, free)]
    return with_one_left(graph, shuffled[: (len(shuffled) + 1) // 2])


def with_one_left(graph: ChannelGraph, remove: Units) -> Units:
    """Return ``remove`` without one unit of each dimension of which it would leave nothing."""
    kept = graph.kept(remove)
    for dims in graph.bindings.values():
        for units in dims.values():
            if not kept[units].any():
                kept[units[0]] = True
    return remove[~kept[remove]]


def lowest(graph: ChannelGraph) -> Units:
    """Return all prunable units but one per dimension."""
    return with_one_left(graph, graph.prunable)


def compare_with_oracles(
    dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, remove: Units, x: Tensor
) -> dict[str, Any]:
    """Return the errors against both oracles, also in double precision if they are not tiny, and the verdict."""
    if np.isin(remove, graph.statistics_units).any():
        return {"verdict": "proof only"}  # the oracles do not hold for these units
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        try:
            dense, pruned, x = dense.to(dtype), pruned.to(dtype), x.to(dtype)
            errors = _errors(dense, pruned, graph, remove, x)
        except Exception as failure:
            if dtype == torch.float32:
                raise
            result["float64"] = f"{type(failure).__name__}: {failure}"[:200]
            break
        result |= errors if dtype == torch.float32 else {f"{key}64": value for key, value in errors.items()}
        if min(errors["dead"], errors["zeroed"]) < TOLERANCE / 10:
            break
    return {**result, "verdict": verdict(result)}


def verdict(row: dict[str, Any]) -> str:
    """Return ``right`` or ``wrong`` by the smaller error; ``proof only`` if the cut hardly changes the output."""
    best = min(row[key] for key in ("dead", "zeroed", "dead64", "zeroed64") if key in row)
    if best >= TOLERANCE:
        return "wrong"
    return "right" if row["effect"] > VISIBLE else "proof only"


class _Cached(nn.Module):
    """Module that returns the stored outputs of a network, so that it runs only once."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            self.outputs = network.eval()(x)

    def forward(self, x: Tensor) -> Any:
        """Return the stored outputs."""
        return self.outputs


def _errors(
    dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, remove: Units, x: Tensor
) -> dict[str, float]:
    cached = _Cached(pruned, x)
    return {
        "dead": error(with_dead_filters(dense, graph, remove), cached, x),
        "zeroed": error(with_zeroed_consumers(dense, graph, remove), cached, x),
        "effect": error(dense, cached, x),
    }


def describe_failure(failure: Exception) -> dict[str, Any]:
    """Return the status, the reason and the place of a failure as a part of a row."""
    refused = isinstance(failure, SurgeryError | surgery.ProofError) or type(failure).__name__ == "TraceError"
    reason = str(failure) if refused else f"{type(failure).__name__}: {failure}"
    return {
        "status": "refused" if refused else "crashed",
        "reason": reason[:600],
        "where": _last_frames(failure),
    }


def _last_frames(failure: Exception) -> list[str]:
    """Return the last three frames of the traceback, which show the library that raised."""
    frames = traceback.extract_tb(failure.__traceback__)[-3:]
    return [f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno} {frame.name}" for frame in frames]
