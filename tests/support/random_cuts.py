"""Cut a network at random and check all properties of the result. Used by tests and benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import ChannelGraph, SurgeryError, prune_, trace
from lightning_prune.testing import error, with_dead_filters, with_zeroed_consumers
from lightning_prune.tracing.calls import tensors_in
from tests.support.random_nets import Net

TOLERANCE = 1e-9
ATTEMPTS = 6  # the first and five more
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


def examine(net: Net, seed: int, share: float, mixing: bool = False) -> Outcome:
    """Build a network, cut it twice at random, and check each result or refusal.

    After a refusal, the units that it names are pinned and others are chosen, as the callbacks do.

    Args:
        net: the spec.
        seed: of the random choice of units.
        share: of the prunable units, about.
        mixing: cut also units over which statistics are taken; values are not compared then.

    Raises:
        CheckFailed: a property does not hold.
    """
    generator = np.random.default_rng(seed)
    model = net.build()
    graph = _trace_around_forward(net, model) if seed % 2 else traced(net, model)
    return cut_at_random(net, model, graph, generator, share, mixing)


def cut_at_random(
    net: Net,
    model: nn.Module,
    graph: ChannelGraph,
    generator: np.random.Generator,
    share: float,
    mixing: bool = False,
) -> Outcome:
    """Cut the network of a spec twice at random, and check each result, see :func:`examine`."""
    outcome = Outcome(prunable=len(graph.prunable), units=_count_filters(graph))
    for _ in range(2):
        for _ in range(ATTEMPTS):
            independent = np.setdiff1d(graph.prunable, graph.statistics_units)
            remove = random_units(graph, generator, share, graph.prunable if mixing else independent)
            if not len(remove):
                return outcome
            try:
                graph = _cut(net, model, graph, remove, mixing, outcome)
                break
            except SurgeryError as refusal:
                graph = _without_refused(graph, remove, refusal)
                outcome.refusals.append(str(refusal))
    return outcome


def traced(net: Net, model: nn.Module) -> ChannelGraph:
    """Trace the network of a spec, on all its examples."""
    return trace(model, net.example(), others=net.other_examples() if net.others else ())


def _trace_around_forward(net: Net, model: nn.Module) -> ChannelGraph:
    """Trace, run the network as in an evaluation, and trace again; both graphs must be the same."""
    before = traced(net, model)
    with torch.no_grad():
        model.eval()(net.example())
    after = traced(net, model)
    facts, facts_after = description(before), description(after)
    difference = next((name for name in facts if facts[name] != facts_after[name]), None)
    if difference is not None and not (net.keeps_constants() and before.pinned.keys() <= after.pinned.keys()):
        raise CheckFailed(f"a forward changes the graph: {difference}")
    return after


def description(graph: ChannelGraph) -> dict[str, Any]:
    """Return what a graph says, as plain values that can be compared with those of another process."""
    return {
        "bindings": {n: {d: u.tolist() for d, u in dims.items()} for n, dims in graph.bindings.items()},
        "pinned": {int(unit): reason for unit, reason in graph.pinned.items()},
        "statistics": graph.statistics_units.tolist(),
        "costs": [int(graph.cost(resource)) for resource in ("macs", "params")],
        "macs without a unit": [int(graph.cost("macs", [unit])) for unit in graph.prunable[:20].tolist()],
    }


def _without_refused(graph: ChannelGraph, remove: Units, refusal: SurgeryError) -> ChannelGraph:
    """Return the graph with the units of a refusal pinned; some of them must be of those that were to be removed."""
    if not np.isin(refusal.units, remove).any():
        raise CheckFailed(f"a refusal names no unit of the cut: {refusal}")
    return replace(graph, pinned={**dict.fromkeys(refusal.units.tolist(), "refused"), **graph.pinned})


def _count_filters(graph: ChannelGraph) -> int:
    return len(np.unique(np.concatenate([*graph.layers.values(), np.empty(0, np.int64)])))


def _cut(
    net: Net, model: nn.Module, graph: ChannelGraph, remove: Units, mixing: bool, outcome: Outcome
) -> ChannelGraph:
    """Cut and check; return the graph of the smaller network. A refusal must leave everything as it was."""
    before, dense = state(model), copy.deepcopy(model)
    oracles: dict[str, nn.Module] = {}
    if not any(getattr(module, "averages_values", False) for module in model.modules()):
        oracles["dead filters"] = with_dead_filters(model, graph, remove)
    if net.by_weights():
        oracles["zeroed consumers"] = with_zeroed_consumers(model, graph, remove)
    try:
        record = prune_(model, graph, remove)
    except SurgeryError as refusal:
        if not same_state(before, state(model)):
            raise CheckFailed(f"refused, but not rolled back: {refusal}") from refusal
        raise
    outcome.cuts, outcome.removed = outcome.cuts + 1, outcome.removed + len(remove)
    examples = [net.example(), *net.other_examples()] if net.by_values() else [net.example()]
    if not mixing:
        _check_values(model, oracles, examples)
        outcome.changes_output |= error(dense, model, examples[0]) > TOLERANCE
    again = traced(net, model)
    _check_costs(net, model, graph, again, remove)
    if max(error(record.apply_(copy.deepcopy(dense)), model, example) for example in examples) > 0:
        raise CheckFailed("the record, applied to the dense network, gives a different network")
    for example in examples:
        _check_training(model, example)
    return again


def _check_values(model: nn.Module, oracles: Mapping[str, nn.Module], examples: Sequence[Tensor]) -> None:
    errors = {
        name: max(error(oracle, model, example) for example in examples) for name, oracle in oracles.items()
    }
    if not all(value <= TOLERANCE for value in errors.values()):
        raise CheckFailed(f"the network differs from the oracles: {errors}")


def _check_costs(net: Net, model: nn.Module, graph: ChannelGraph, after: ChannelGraph, remove: Units) -> None:
    params = sum(p.numel() for p in model.parameters())
    if params != graph.cost("params", remove):
        raise CheckFailed(f"{params} parameters, predicted were {graph.cost('params', remove)}")
    if net.by_values():
        return  # the number of positions is another one after the cut
    predicted, again = graph.cost("macs", remove), after.cost("macs")
    if again != predicted:
        raise CheckFailed(f"{again} MACs in a new trace, predicted were {predicted}")
    if not net.is_counted() or _has_fused_attention(model):
        return
    measured = measured_macs(model, net.example())
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
    outputs = [out for out in tensors_in(model(example)) if out.numel()]
    loss = torch.stack([out.square().mean() for out in outputs]).sum()
    if loss.requires_grad:
        loss.backward()
    misshapen = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.shape != p.shape]
    if misshapen or not torch.isfinite(loss):
        raise CheckFailed(f"does not train: {misshapen or loss}")
    model.zero_grad(set_to_none=True)
    model.eval()
