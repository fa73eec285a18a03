"""The branch of a residual addition: the operators that only it needs, and the modules that run nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lightning_prune.graph.dataflow import Boundary, Flow, Value
from lightning_prune.utils.stand_ins import structure

__all__ = ["Branch", "branch_of", "modules_of_branches", "replacements_of"]


@dataclass(frozen=True)
class Branch:
    """A branch of one addition in one forward.

    Attributes:
        flow: the forward.
        add: the operator that adds.
        stream: the operand that the branch is added to.
        operators: those that nothing but the branch needs.
        remaining: those that the outputs need without the branch.
    """

    flow: Flow
    add: int
    stream: int
    operators: frozenset[int]
    remaining: frozenset[int]

    @property
    def is_written(self) -> bool:
        """Whether the addition is made in the memory of the branch."""
        return self.flow.steps[self.add].in_place and self.stream == 1


def branch_of(flow: Flow, add: int, gone: Mapping[int, int]) -> Branch | str:
    """Return the branch of an addition; text says why there is none that may vanish, "" if it is no block at all."""
    step = flow.steps[add]
    stream = next((position for position in (0, 1) if _is_input_of(flow, add, position, gone)), None)
    if stream is None:
        return _why_no_stream(flow, add)
    if stream == 1 and (step.is_difference or step.call.arg("alpha", 1) != 1):
        return "its input is not what the branch is added to, but what is subtracted or scaled"
    base = flow.live(gone, effects=())
    remaining = flow.live({**gone, add: stream}, effects=())
    operators = base - remaining
    if not operators:
        return (
            ""
            if not _has_weights(flow, flow.closure(step.sources[1 - stream]))
            else "its branch is used elsewhere"
        )
    if not _has_weights(flow, operators):
        return ""  # a formula, such as that of an activation function
    return Branch(flow, add, stream, frozenset(operators), frozenset(remaining))


def _is_input_of(flow: Flow, add: int, position: int, gone: Mapping[int, int]) -> bool:
    """Return whether the other operand was computed from the one at ``position``."""
    step = flow.steps[add]
    stream, other = step.reads[position], step.sources[1 - position]
    if step.reads[1 - position] == stream:
        return False
    stream = flow.canonical(stream, gone)
    read = {
        flow.canonical(value, gone)
        for number in flow.closure(other, gone)
        for value in flow.steps[number].reads
    }
    return stream in read or _earlier(flow, stream) in read


def _earlier(flow: Flow, value: Value) -> Value | None:
    """Return the stream to which a parallel branch was added before; None if the value is no such sum."""
    if value[0] not in ("out", "write") or not flow.steps[value[1]].is_addition:
        return None
    step = flow.steps[value[1]]
    for position in (0, 1):
        sources = flow.closure(step.sources[1 - position])
        if any(step.reads[position] in flow.steps[number].reads for number in sources):
            return step.reads[position]
    return None


def _why_no_stream(flow: Flow, add: int) -> str:
    """Return why an addition of two layers' outputs is no block that may vanish; "" if it adds something else."""
    step = flow.steps[add]
    both = [flow.closure(sources) for sources in step.sources]
    own = [each - other for each, other in (both, both[::-1])]
    if all(_has_weights(flow, each) for each in own):
        return (
            "its shortcut is computed by a layer, since the shape changes: it is not the input of the branch"
        )
    if step.call.module and any(_has_weights(flow, each) for each in own) and all(step.sources):
        return "its shortcut is not the input of the branch (it is resampled or padded)"
    return ""


def _has_weights(flow: Flow, operators: Iterable[int]) -> bool:
    """Return whether one of the operators reads a parameter or buffer of two dimensions or more."""
    return any(
        value[0] == "model" and tensor.dim() > 1
        for number in operators
        for value, tensor in zip(flow.steps[number].reads, flow.steps[number].call.tensors, strict=True)
    )


def modules_of_branches(branches: Sequence[Branch], flows: Sequence[Flow]) -> list[str]:
    """Return the modules that run for nothing but a branch in any of the forwards, none within another.

    Args:
        branches: of the same addition, in the forwards that make it.
        flows: all forwards.
    """
    needed = {id(flow): flow.live(effects=()) for flow in flows}
    for branch in branches:
        needed[id(branch.flow)] = set(branch.remaining)
    sums = {id(flow): _running_sum(needed[id(flow)], len(flow.steps)) for flow in flows}
    inside = {id(branch.flow): _running_sum(branch.operators, len(branch.flow.steps)) for branch in branches}
    names = {
        boundary.call.name
        for branch in branches
        for boundary in branch.flow.calls
        if boundary.call.name and _count(inside[id(branch.flow)], boundary)
    }
    exclusive = {
        name
        for name in names
        if all(not _count(sums[id(flow)], b) for flow in flows for b in flow.calls_of.get(name, ()))
    }
    return [
        name for name in sorted(exclusive) if not any(name.startswith(f"{other}.") for other in exclusive)
    ]


def _running_sum(numbers: Iterable[int], length: int) -> list[int]:
    marks = [0] * (length + 1)
    for number in numbers:
        marks[number + 1] = 1
    return list(accumulate(marks))


def _count(sums: Sequence[int], boundary: Boundary) -> int:
    return sums[boundary.call.end] - sums[boundary.call.start]


def replacements_of(
    flows: Sequence[Flow], adds: Sequence[tuple[int, int] | None], modules: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return what takes the place of the modules of a branch: zero for the last one, and the others pass their input.

    Args:
        flows: all forwards.
        adds: for each of them, the addition and the position of its stream.
        modules: that belong to the branch.

    Raises:
        ValueError: a module returns an object that nothing can take the place of.
    """
    last, full = _last_module(flows, adds, modules)
    found: dict[str, dict[str, Any]] = {}
    for name in modules:
        outputs = _structure_of(flows, name)
        is_zero = name == last or last is None
        found[name] = {"as": "zero" if is_zero else "passed", "outputs": outputs}
        if is_zero:
            found[name]["full"] = full or last is None or outputs != "x"
    return found


def _last_module(
    flows: Sequence[Flow], adds: Sequence[tuple[int, int] | None], modules: Sequence[str]
) -> tuple[str | None, bool]:
    """Return the module that returns the branch's output in every forward, and whether the sum is written into it."""
    candidates: list[set[str]] = []
    order: dict[str, int] = {}
    full = False
    for flow, add in zip(flows, adds, strict=True):
        if add is None:
            continue
        step = flow.steps[add[0]]
        value = step.reads[1 - add[1]]
        full |= step.in_place and add[1] == 1
        ends = [b for b in flow.calls if b.call.name in modules and b.out[:1] == [value]]
        candidates.append({b.call.name for b in ends})
        for at, boundary in enumerate(ends):
            order[boundary.call.name] = max(order.get(boundary.call.name, 0), at)
    common = set.intersection(*candidates) if candidates else set()
    return max(common, key=lambda name: order[name], default=None), full


def _structure_of(flows: Sequence[Flow], name: str) -> Any:
    found = [structure(b.call.out) for flow in flows for b in flow.calls_of.get(name, ())]
    if any(each != found[0] for each in found):
        raise ValueError(f"{name!r} returns other things in other calls")
    return found[0] if found else "x"
