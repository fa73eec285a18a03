"""What our engine does to one network: trace, plan, a random cut, its proof, and what the oracles say of it."""

from __future__ import annotations

import copy
import time
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

__all__ = ["TOLERANCE", "Seconds", "awake_", "lowest", "measure", "random_half", "verdict", "warm_up"]

Units = NDArray[np.int64]
ATTEMPTS = 6  # the first and five more
TOLERANCE = 1e-4
VISIBLE = 1e-2  # a cut that changes the output by less than this is no test for an oracle
ASLEEP = 1e-3
NO_LIMITS = Limits(layers=1.0)
HALF = {"macs": 0.5}


@dataclass
class Seconds:
    """Seconds of the wall clock and of this process, by the name of the step."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """Add what the block takes to ``step``."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall[step] = self.wall.get(step, 0.0) + time.perf_counter() - wall
            self.cpu[step] = self.cpu.get(step, 0.0) + time.process_time() - cpu

    def of_rest(self, step: str, whole: str, part: str) -> None:
        """Replace ``whole`` by what it took beyond ``part``, as ``step``."""
        for times in (self.wall, self.cpu):
            times[step] = times.pop(whole, 0.0) - times.get(part, 0.0)


def measure(network: Network) -> dict[str, Any]:
    """Trace, plan, cut a random half and prove it, and ask both oracles; plain values."""
    warm_up()
    torch.manual_seed(0)
    model = awake_(randomise_(network.build())).eval()
    dense = copy.deepcopy(model)
    example = torch.randn(1, 3, network.size, network.size)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        graph, remove = run_engine(model, example, found)
        found |= ask_oracles(dense, model, graph, remove, torch.randn(2, *example.shape[1:]))
    except Exception as raised:
        return {**found, **_failure(raised)}
    return {**found, "status": "proven"}


def awake_(model: nn.Module) -> nn.Module:
    """Give weights that start at zero, and scales that start at almost nothing, values that oracles can see."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() and parameter.abs().max() < ASLEEP:
            wide = parameter.numel() > max(parameter.shape)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise * parameter[0].numel() ** -0.5 if wide else noise.abs() + 0.5)
    return model


def warm_up() -> None:
    """Handle a toy, so that nobody pays for what is imported and built at the first call."""
    toy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    graph = trace(toy, torch.zeros(1, 3, 8, 8))
    scores = L2()(graph, toy, {})
    prune_(toy, graph, select(graph, scores, HALF, limits=NO_LIMITS).remove)


def run_engine(model: nn.Module, example: Tensor, found: dict[str, Any]) -> tuple[ChannelGraph, Units]:
    """Trace, plan half the MACs by magnitude, cut a random half and prove; ``found`` gets the facts as they come."""
    seconds, refusals = Seconds(), list[str]()
    found |= {"wall": seconds.wall, "cpu": seconds.cpu, "retried": refusals}
    with peak_memory() as peak, _proof_timed(seconds):
        with seconds.of("trace"):
            graph = trace(model, example)
        found |= {**_units(graph), **_costs(graph, model, seconds)}
        try:
            remove = cut_with_retries(model, graph, refusals, seconds)
        finally:
            seconds.of_rest("surgery", "cut", "proof")
    found |= {"peak_mb": peak.megabytes, "removed": len(remove)}
    return graph, remove


def _costs(graph: ChannelGraph, model: nn.Module, seconds: Seconds) -> dict[str, Any]:
    """What a user's plan of half the MACs comes to, and how low one could go."""
    if not len(graph.prunable):
        return {"share": 1.0, "lowest": 1.0}
    with seconds.of("plan"):
        scores = L2()(graph, model, {})
        plan = select(graph, scores, HALF, limits=NO_LIMITS, dense=DenseSizes.of(graph))
    macs = max(graph.cost("macs"), 1)
    return {"share": plan.costs["macs"].after / macs, "lowest": graph.cost("macs", lowest(graph)) / macs}


def _units(graph: ChannelGraph) -> dict[str, Any]:
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
    """Cut a random half; pin what surgery refuses (noted in ``refusals``) and choose again, as the callback does."""
    while True:
        remove = random_half(graph)
        if not len(remove):
            raise SurgeryError(refusals[-1] if refusals else "nothing can be removed")
        try:
            with seconds.of("cut"):
                prune_(model, graph, remove)
            return remove
        except SurgeryError as refused:
            refusals.append(str(refused)[:300])
            if not len(refused.units) or len(refusals) == ATTEMPTS:
                raise
            pinned = dict.fromkeys(refused.units.tolist(), f"surgery refused: {refused}")
            graph = replace(graph, pinned={**pinned, **graph.pinned})


@contextmanager
def _proof_timed(seconds: Seconds) -> Iterator[None]:
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
    """Half of the prunable units that meet no statistics (of all if there are none), one left per dimension."""
    free = graph.prunable[~np.isin(graph.prunable, graph.statistics_units)]
    free = free if len(free) else graph.prunable
    order = np.random.default_rng(0).permutation(graph.num_units)
    chosen = order[np.isin(order, free)]
    return with_one_left(graph, chosen[: (len(chosen) + 1) // 2])


def with_one_left(graph: ChannelGraph, remove: Units) -> Units:
    """``remove`` without one unit of every dimension of which it would leave nothing."""
    kept = graph.kept(remove)
    for dims in graph.bindings.values():
        for units in dims.values():
            if not kept[units].any():
                kept[units[0]] = True
    return remove[~kept[remove]]


def lowest(graph: ChannelGraph) -> Units:
    """All that is prunable but one unit per dimension."""
    return with_one_left(graph, graph.prunable)


def ask_oracles(
    dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, remove: Units, x: Tensor
) -> dict[str, Any]:
    """Errors of both oracles, again in double precision if in doubt, and the verdict."""
    if np.isin(remove, graph.statistics_units).any():
        return {"verdict": "proof only"}  # every prunable unit meets statistics: the oracles do not hold
    found: dict[str, Any] = {}
    for digits in (torch.float32, torch.float64):
        try:
            dense, pruned, x = dense.to(digits), pruned.to(digits), x.to(digits)
            errors = _errors(dense, pruned, graph, remove, x)
        except Exception as raised:
            if digits == torch.float32:
                raise
            found["float64"] = f"{type(raised).__name__}: {raised}"[:200]
            break
        found |= errors if digits == torch.float32 else {f"{key}64": value for key, value in errors.items()}
        if min(errors["dead"], errors["zeroed"]) < TOLERANCE / 10:
            break
    return {**found, "verdict": verdict(found)}


def verdict(found: dict[str, Any]) -> str:
    """``right`` and ``wrong`` by the better oracle; ``proof only`` where neither can see the cut."""
    best = min(found[key] for key in ("dead", "zeroed", "dead64", "zeroed64") if key in found)
    if best >= TOLERANCE:
        return "wrong"
    return "right" if found["effect"] > VISIBLE else "proof only"


class _Known(nn.Module):
    """A network whose outputs are known already."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            self.outputs = network.eval()(x)

    def forward(self, x: Tensor) -> Any:
        """What the network made of its input."""
        return self.outputs


def _errors(
    dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, remove: Units, x: Tensor
) -> dict[str, float]:
    found = _Known(pruned, x)
    return {
        "dead": error(with_dead_filters(dense, graph, remove), found, x),
        "zeroed": error(with_zeroed_consumers(dense, graph, remove), found, x),
        "effect": error(dense, found, x),  # what the cut changes: oracles see nothing where this is nothing
    }


def _failure(raised: Exception) -> dict[str, Any]:
    refused = isinstance(raised, SurgeryError | surgery.ProofError) or type(raised).__name__ == "TraceError"
    reason = str(raised) if refused else f"{type(raised).__name__}: {raised}"
    return {"status": "refused" if refused else "crashed", "reason": reason[:600], "where": _origin(raised)}


def _origin(raised: Exception) -> list[str]:
    """The last three frames, to see in whose code it happened."""
    frames, at = [], raised.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        frames.append(f"{code.co_filename.split('site-packages/')[-1]}:{at.tb_lineno} {code.co_name}")
        at = at.tb_next
    return frames[-3:]
