"""Cut a network at random and check all properties of the result. Used by tests and benchmarks."""

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


class CheckFailed(AssertionError):
    """A property that every cut must have does not hold."""


@dataclass
class Outcome:
    """Result of the cuts of one network.

    Attributes:
        cuts: number of cuts that were made.
        refusals: messages of the cuts that were refused.
        removed: number of removed units.
        prunable: number of prunable units of the dense network.
        units: number of its units that are filters.
        changes_output: whether a cut changed the output; otherwise the oracles can show no error.
    """

    cuts: int = 0
    refusals: list[str] = field(default_factory=list)
    removed: int = 0
    prunable: int = 0
    units: int = 0
    changes_output: bool = False


def random_units(graph: ChannelGraph, generator: np.random.Generator, share: float, among: Units) -> Units:
    """Choose about a ``share`` of the units ``among``, at random; every bound dimension keeps one index."""
    bound = [units for dims in graph.bindings.values() for units in dims.values()]
    counts = [dict(zip(*np.unique(units, return_counts=True), strict=True)) for units in bound]
    remaining = [len(units) for units in bound]
    dims_of_unit: dict[int, list[int]] = {}
    for index, count in enumerate(counts):
        for unit in count:
            dims_of_unit.setdefault(int(unit), []).append(index)
    chosen: list[int] = []
    for unit in generator.permutation(among).tolist():
        dims = dims_of_unit.get(unit, [])
        if len(chosen) < max(1, share * len(among)) and all(remaining[d] > counts[d][unit] for d in dims):
            chosen.append(unit)
            for dim in dims:
                remaining[dim] -= counts[dim][unit]
    return np.array(sorted(chosen), dtype=np.int64)


def state(model: nn.Module) -> list[tuple[str, Any]]:
    """Return all tensors and plain attributes of a model, which a refused cut must not change."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values: list[tuple[str, Any]] = [(name, (id(t), t.detach().clone())) for name, t in tensors.items()]
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (int, float, str, tuple, list)):
                values.append((f"{path}.{name}", copy.copy(value)))
    return values


def same_state(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> bool:
    """Whether both states are equal: tensors bit by bit, attributes with their types."""
    return len(before) == len(after) and all(
        a == b and _is_same(x, y) for (a, x), (b, y) in zip(before, after, strict=True)
    )


def _is_same(x: Any, y: Any) -> bool:
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor):
        return x[0] == y[0] and torch.equal(x[1], y[1])
    return type(x) is type(y) and x == y


def measured_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Count multiply-accumulates with torch's counter, which does not see fused attention on the CPU."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def examine(
    model: nn.Module, example: Tensor, seed: int, share: float, by_weights: bool = True, mixing: bool = False
) -> Outcome:
    """Cut ``model`` twice at random, and check each result or refusal.

    Args:
        model: changed in place.
        example: an input.
        seed: of the random choice of units.
        share: of the prunable units, about.
        by_weights: whether the zeroed-consumer oracle is valid for the model.
        mixing: cut also units over which statistics are taken; values are not compared then.

    Raises:
        CheckFailed: a property does not hold.
    """
    generator, outcome = np.random.default_rng(seed), Outcome()
    graph = trace(model, example)
    outcome.prunable, outcome.units = len(graph.prunable), _count_filters(graph)
    for _ in range(2):
        independent = np.setdiff1d(graph.prunable, graph.statistics_units)
        remove = random_units(graph, generator, share, graph.prunable if mixing else independent)
        after = _cut(model, graph, example, remove, by_weights, mixing, outcome) if len(remove) else None
        if after is None:
            break
        graph = after
    return outcome


def _count_filters(graph: ChannelGraph) -> int:
    return len(np.unique(np.concatenate([*graph.layers.values(), np.empty(0, np.int64)])))


def _cut(
    model: nn.Module, graph: ChannelGraph, example: Tensor, remove: Units, by_weights: bool, mixing: bool,
    outcome: Outcome,
) -> ChannelGraph | None:  # fmt: skip
    """Cut and check; return the graph of the smaller network, None if the cut was refused."""
    before, dense = state(model), copy.deepcopy(model)
    oracles = {"dead filters": with_dead_filters(model, graph, remove)}
    if by_weights:
        oracles["zeroed consumers"] = with_zeroed_consumers(model, graph, remove)
    try:
        record = prune_(model, graph, remove)
    except SurgeryError as refusal:
        outcome.refusals.append(str(refusal))
        if not same_state(before, state(model)):
            raise CheckFailed(f"refused, but not rolled back: {refusal}") from refusal
        return None
    outcome.cuts, outcome.removed = outcome.cuts + 1, outcome.removed + len(remove)
    if not mixing:
        _check_values(model, oracles, example)
        outcome.changes_output |= error(dense, model, example) > TOLERANCE
    again = trace(model, example)
    _check_costs(model, graph, again, remove, example)
    if error(record.apply_(dense), model, example) > 0:
        raise CheckFailed("the record, applied to the dense network, gives a different network")
    _check_training(model, example)
    return again


def _check_values(model: nn.Module, oracles: Mapping[str, nn.Module], example: Tensor) -> None:
    errors = {name: error(oracle, model, example) for name, oracle in oracles.items()}
    if not all(value <= TOLERANCE for value in errors.values()):
        raise CheckFailed(f"the network differs from the oracles: {errors}")


def _check_costs(
    model: nn.Module, graph: ChannelGraph, after: ChannelGraph, remove: Units, example: Tensor
) -> None:
    params = sum(p.numel() for p in model.parameters())
    if params != graph.cost("params", remove):
        raise CheckFailed(f"{params} parameters, predicted were {graph.cost('params', remove)}")
    predicted, again = graph.cost("macs", remove), after.cost("macs")
    measured = again if _has_fused_attention(model) else measured_macs(model, example)
    if again != predicted:
        raise CheckFailed(f"{again} MACs in a new trace, predicted were {predicted}")
    # torch computes einsum over a single channel as a product of elements, which its counter does not see
    if measured != again and not (measured < again and _has_einsum(model)):
        raise CheckFailed(f"torch counts {measured} MACs, the new trace {again}")


def _has_fused_attention(model: nn.Module) -> bool:
    """Whether there is attention that torch's counter does not see."""
    kinds = (nn.MultiheadAttention,)
    return any(getattr(m, "product", "") == "fused" or isinstance(m, kinds) for m in model.modules())


def _has_einsum(model: nn.Module) -> bool:
    names = {getattr(m, name, "") for m in model.modules() for name in ("style", "product")}
    return bool(names & {"einsum", "grouped"})


def _check_training(model: nn.Module, example: Tensor) -> None:
    model.train()
    outputs = tensors_in(model(example))
    loss = torch.stack([out.square().mean() for out in outputs]).sum()
    if loss.requires_grad:
        loss.backward()
    misshapen = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.shape != p.shape]
    if misshapen or not torch.isfinite(loss):
        raise CheckFailed(f"does not train: {misshapen or loss}")
    model.zero_grad(set_to_none=True)
    model.eval()
