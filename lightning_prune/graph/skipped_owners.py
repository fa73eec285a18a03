"""Modules of which nothing but the shortcut is left when blocks vanish, perhaps with the activation behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune.graph.dataflow import Boundary, Flow
from lightning_prune.utils.stand_ins import ACTIVATIONS

__all__ = ["skipped_owners"]


def skipped_owners(
    model: nn.Module, flows: Sequence[Flow], severed: Sequence[Mapping[int, int]], owners: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the modules that only pass their input on where additions are severed -> what takes their place.

    Args:
        model: the network.
        flows: its forwards.
        severed: for each of them, addition -> the operand that is its result.
        owners: names of the modules to look at.
    """
    found: dict[str, dict[str, Any]] = {}
    for owner in sorted(owners):
        if not owner or "." not in f"{owner}." or owner not in dict(model.named_modules()):
            continue
        descriptions = [
            _description(flow, boundary, cuts)
            for flow, cuts in zip(flows, severed, strict=True)
            for boundary in flow.calls_of.get(owner, ())
        ]
        if descriptions and descriptions[0] is not None and all(d == descriptions[0] for d in descriptions):
            found[owner] = descriptions[0]
            # Whatever works in place on the block's output must not reach its input, which autograd may have saved.
            calls = ((flow, boundary) for flow in flows for boundary in flow.calls_of.get(owner, ()))
            if any(flow.is_written_after(boundary) for flow, boundary in calls):
                found[owner]["copy"] = True
    return found


def _description(flow: Flow, owner: Boundary, severed: Mapping[int, int]) -> dict[str, Any] | None:
    """Return what takes the place of a module in one call; None if more than its shortcut is left."""
    call = owner.call
    out = call.out[0] if isinstance(call.out, tuple) and len(call.out) == 1 else call.out
    if not isinstance(out, Tensor) or len(owner.out) != 1:
        return None
    inside = range(call.start, call.end)
    effects = {number for number in flow.effects if number not in inside}
    live = flow.live(severed, effects)
    rest = sorted(number for number in inside if number in live and number not in severed)
    value, activation = flow.canonical(owner.out[0], severed), dict[str, Any]()
    if rest:
        found = _child(flow, owner, rest) or _function(flow, rest)
        if found is None or owner.out[0] not in found[1]:
            return None
        value, activation = flow.canonical(found[0], severed), found[2]
    for position, (values, argument) in enumerate(zip(owner.args, call.args, strict=True)):
        if isinstance(argument, Tensor) and flow.canonical(values[0], severed) == value:
            return {"as": "skipped", "source": position, "nested": isinstance(call.out, tuple)} | activation
    return None


def _child(flow: Flow, owner: Boundary, rest: Sequence[int]) -> tuple[Any, list[Any], dict[str, Any]] | None:
    """Return input, output and description of the one direct child that made all of the operators ``rest``."""
    for boundary in flow.calls:
        call = boundary.call
        parent, _, name = call.name.rpartition(".")
        is_inside = owner.call.start <= call.start <= rest[0] and rest[-1] < call.end <= owner.call.end
        if parent == owner.call.name and is_inside and len(boundary.args) == 1 and len(boundary.args[0]) == 1:
            return boundary.args[0][0], boundary.out, {"activation": name}
    return None


def _function(flow: Flow, rest: Sequence[int]) -> tuple[Any, list[Any], dict[str, Any]] | None:
    """Return input, output and description of an activation that is called as a function."""
    step = flow.steps[rest[0]]
    name = step.call.op._opname.rstrip("_")
    if len(rest) > 1 or name not in ACTIVATIONS:
        return None
    options = {"approximate": step.call.arg("approximate")} if name == "gelu" else {}
    return step.reads[0], step.makes, {"function": name, **({"options": options} if options else {})}
