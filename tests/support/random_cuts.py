"""Random cuts of a network, and everything that must hold after one. Used by tests and benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import ChannelGraph, SurgeryError, prune_, trace
from lightning_prune.testing import error, with_dead_filters, with_zeroed_consumers
from lightning_prune.tracing.calls import tensors_in

TOLERANCE = 1e-9
Units = NDArray[np.int64]


class Wrong(AssertionError):
    """The engine did something wrong to a network."""


@dataclass
class Outcome:
    """What came of one network.

    Attributes:
        cuts: how many cuts were proven.
        refusals: why the others were refused.
        removed: how many units went.
        prunable: the units that might have gone, in the dense network.
        units: all of its units that are filters.
        bites: the cut changed the output, so that the oracles had something to see.
    """

    cuts: int = 0
    refusals: list[str] = field(default_factory=list)
    removed: int = 0
    prunable: int = 0
    units: int = 0
    bites: bool = False


def random_units(graph: ChannelGraph, generator: np.random.Generator, share: float, among: Units) -> Units:
    """Random units ``among`` the prunable ones, about a ``share`` of them; every bound dimension keeps one."""
    bound = [units for dims in graph.bindings.values() for units in dims.values()]
    counts = [dict(zip(*np.unique(units, return_counts=True), strict=True)) for units in bound]
    left = [len(units) for units in bound]
    where: dict[int, list[int]] = {}
    for place, count in enumerate(counts):
        for unit in count:
            where.setdefault(int(unit), []).append(place)
    chosen: list[int] = []
    for unit in generator.permutation(among).tolist():
        places = where.get(unit, [])
        if len(chosen) < max(1, share * len(among)) and all(left[p] > counts[p][unit] for p in places):
            chosen.append(unit)
            for place in places:
                left[place] -= counts[place][unit]
    return np.array(sorted(chosen), dtype=np.int64)


def state(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything that a refused cut must leave alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: list[tuple[str, Any]] = [(name, (id(t), t.detach().clone())) for name, t in tensors.items()]
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (int, float, str, tuple, list)):
                found.append((f"{path}.{name}", copy.copy(value)))
    return found


def same_state(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> bool:
    """Are both the same, tensors bit by bit, attributes with their types?"""
    return len(before) == len(after) and all(
        a == b and _same(x, y) for (a, x), (b, y) in zip(before, after, strict=True)
    )


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor):
        return x[0] == y[0] and torch.equal(x[1], y[1])
    return type(x) is type(y) and x == y


def measured_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates by torch's own counter, which leaves out fused attention on the CPU."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def examine(
    model: nn.Module, example: Tensor, seed: int, share: float, by_weights: bool = True, mixing: bool = False
) -> Outcome:
    """Cut ``model`` twice at random and hold every promise against it.

    Args:
        model: changed in place.
        example: an input.
        seed: of the random choice of units.
        share: of the prunable units, about.
        by_weights: whether the zeroed-consumer oracle holds for it.
        mixing: cut units whose statistics mix, too: then values cannot be compared.

    Raises:
        Wrong: something does not hold, with the reason.
    """
    generator, outcome = np.random.default_rng(seed), Outcome()
    graph = trace(model, example)
    outcome.prunable, outcome.units = len(graph.prunable), _filters(graph)
    for _ in range(2):
        clean = np.setdiff1d(graph.prunable, graph.statistics_units)
        remove = random_units(graph, generator, share, graph.prunable if mixing else clean)
        after = _cut(model, graph, example, remove, by_weights, mixing, outcome) if len(remove) else None
        if after is None:
            break
        graph = after
    return outcome


def _filters(graph: ChannelGraph) -> int:
    return len(np.unique(np.concatenate([*graph.layers.values(), np.empty(0, np.int64)])))


def _cut(
    model: nn.Module, graph: ChannelGraph, example: Tensor, remove: Units, by_weights: bool, mixing: bool,
    outcome: Outcome,
) -> ChannelGraph | None:  # fmt: skip
    """Cut and check; the graph of what is left, None where the cut was refused."""
    before, dense = state(model), copy.deepcopy(model)
    oracles = {"dead filters": with_dead_filters(model, graph, remove)}
    if by_weights:
        oracles["zeroed consumers"] = with_zeroed_consumers(model, graph, remove)
    try:
        record = prune_(model, graph, remove)
    except SurgeryError as refusal:
        outcome.refusals.append(str(refusal))
        if not same_state(before, state(model)):
            raise Wrong(f"refused, but not rolled back: {refusal}") from refusal
        return None
    outcome.cuts, outcome.removed = outcome.cuts + 1, outcome.removed + len(remove)
    if not mixing:
        _values(model, oracles, example)
        outcome.bites |= error(dense, model, example) > TOLERANCE
    again = trace(model, example)
    _costs(model, graph, again, remove, example)
    if error(record.apply_(dense), model, example) > 0:
        raise Wrong("the record, applied to the dense network, gives another one")
    _trains(model, example)
    return again


def _values(model: nn.Module, oracles: Mapping[str, nn.Module], example: Tensor) -> None:
    found = {name: error(oracle, model, example) for name, oracle in oracles.items()}
    if not all(value <= TOLERANCE for value in found.values()):
        raise Wrong(f"oracles differ: {found}")


def _costs(
    model: nn.Module, graph: ChannelGraph, after: ChannelGraph, remove: Units, example: Tensor
) -> None:
    params = sum(p.numel() for p in model.parameters())
    if params != graph.cost("params", remove):
        raise Wrong(f"{params} parameters, {graph.cost('params', remove)} were predicted")
    predicted, again = graph.cost("macs", remove), after.cost("macs")
    measured = again if _fused(model) else measured_macs(model, example)
    if again != predicted:
        raise Wrong(f"{again} MACs in a new trace, {predicted} were predicted")
    # einsum over a single channel multiplies, which torch does not count
    if measured != again and not (measured < again and _einsum(model)):
        raise Wrong(f"torch counts {measured} MACs, the new trace {again}")


def _fused(model: nn.Module) -> bool:
    """Is there attention that torch's counter does not see?"""
    kinds = (nn.MultiheadAttention,)
    return any(getattr(m, "product", "") == "fused" or isinstance(m, kinds) for m in model.modules())


def _einsum(model: nn.Module) -> bool:
    names = {getattr(m, name, "") for m in model.modules() for name in ("style", "product")}
    return bool(names & {"einsum", "grouped"})


def _trains(model: nn.Module, example: Tensor) -> None:
    model.train()
    outputs = tensors_in(model(example))
    loss = torch.stack([out.square().mean() for out in outputs]).sum()
    if loss.requires_grad:
        loss.backward()
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.shape != p.shape]
    if wrong or not torch.isfinite(loss):
        raise Wrong(f"does not train: {wrong or loss}")
    model.zero_grad(set_to_none=True)
    model.eval()
