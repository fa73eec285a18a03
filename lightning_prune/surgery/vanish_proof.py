"""Prove that a network without some residual blocks computes what the network with zero in their place does.

Both forwards are recorded. The operators that the outputs of the network with severed branches depend on must be
those of the smaller network: in the same order, with the same arguments, on the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.dataflow import Flow, Step, Value
from lightning_prune.utils.modules import within_any

__all__ = ["VanishingError", "prove_vanished"]

#: which of them a reshape becomes depends on the layout in memory
_RESHAPES = {"_unsafe_view": "view", "_reshape_alias": "view"}


class VanishingError(RuntimeError):
    """The network without the blocks does not compute what it does with zero in place of their branches.

    Attributes:
        blocks: names of the blocks that cannot vanish, once it is known which ones.
    """

    blocks: tuple[str, ...] = ()


def prove_vanished(
    dense: Sequence[Flow],
    severed: Sequence[Mapping[int, int]],
    small: Sequence[Flow],
    gone: Sequence[Mapping[int, int]],
    modules: Sequence[str],
) -> None:
    """Compare the forwards of a network before and after blocks have vanished.

    Args:
        dense: forwards before.
        severed: of each of them, additions of branches that are zero -> the operand that is their result.
        small: forwards after, in the same modes and with the same inputs.
        gone: as ``severed``, of these.
        modules: names of the modules that were replaced.

    Raises:
        VanishingError: the forwards differ.
    """
    if len(dense) != len(small):
        raise VanishingError("the network without the blocks runs in other modes")
    for parts in zip(dense, severed, small, gone, strict=True):
        _Walk(*parts, modules).compare()


class _Walk:
    """Compares two forwards operator by operator."""

    def __init__(
        self,
        dense: Flow,
        severed: Mapping[int, int],
        small: Flow,
        gone: Mapping[int, int],
        modules: Sequence[str],
    ) -> None:
        self.flows, self.cuts, self.modules = (dense, small), (severed, gone), modules
        self.tokens: tuple[dict[Value, Any], dict[Value, Any]] = ({}, {})
        self.numbers: tuple[dict[int, int], dict[int, int]] = ({}, {})  # operator -> number of its pair

    def compare(self) -> None:
        """Raise unless both forwards compute the same."""
        for count, (left, right) in enumerate(zip_longest(self._live(0), self._live(1))):
            if left is None or right is None:
                which = self.flows[0 if right is None else 1].steps[left if right is None else right]
                raise VanishingError(f"{which.call} runs in one of the two only")
            self._match(left, right, count)
        outputs = [
            [self._token(side, value) for value, _ in flow.outputs] for side, flow in enumerate(self.flows)
        ]
        shapes = [[tensor.shape for tensor in flow.recording.outputs] for flow in self.flows]
        if outputs[0] != outputs[1] or shapes[0] != shapes[1]:
            raise VanishingError("the outputs are not the same")

    def _live(self, side: int) -> list[int]:
        flow = self.flows[side]
        inside = {
            number
            for boundary in flow.calls
            if within_any(boundary.call.name, self.modules)
            for number in range(boundary.call.start, boundary.call.end)
        }
        live = flow.live(self.cuts[side], flow.effects - inside if side == 0 else None)
        live -= self.cuts[side].keys()
        return sorted(number for number in live if not flow.steps[number].is_layout)

    def _match(self, left: int, right: int, count: int) -> None:
        steps = self.flows[0].steps[left], self.flows[1].steps[right]
        names = [_RESHAPES.get(name := step.call.op._opname.rstrip("_"), name) for step in steps]
        if names[0] != names[1] or len(steps[0].reads) != len(steps[1].reads):
            raise VanishingError(f"{steps[1].call} takes the place of {steps[0].call}")
        reads = [[self._token(side, value) for value in step.reads] for side, step in enumerate(steps)]
        for position, (a, b) in enumerate(zip(*reads, strict=True)):
            if a != b and not self._bind_inputs(steps, position):
                raise VanishingError(f"{steps[1].call} reads something else than before")
        if _plain(steps[0]) != _plain(steps[1]) or _shapes(steps[0]) != _shapes(steps[1]):
            raise VanishingError(f"{steps[1].call} is called with other arguments or sizes than before")
        for side, (step, number) in enumerate(zip(steps, (left, right), strict=True)):
            self.numbers[side][number] = count
            for index, value in enumerate(step.makes):
                self.tokens[side][value] = ("made", count, index)

    def _token(self, side: int, value: Value) -> Any:
        """Return what a value is in both forwards."""
        value = self.flows[side].canonical(value, self.cuts[side])
        if value in self.tokens[side]:
            return self.tokens[side][value]
        if value[0] == "model":
            return value
        if value[0] == "through":
            writers = tuple(self.numbers[side].get(number) for number in value[2:])
            return ("through", self._token(side, value[1]), writers)
        if value[0] in ("out", "write") and value[1] in self.numbers[side]:
            return (value[0], self.numbers[side][value[1]], value[2])
        return (side, value)  # equals no token of the other forward

    def _bind_inputs(self, steps: tuple[Step, Step], position: int) -> bool:
        """Take two inputs, or constants of the code, that were not met before for the same."""
        values = [
            self.flows[side].canonical(step.reads[position], self.cuts[side])
            for side, step in enumerate(steps)
        ]
        tensors = [step.call.tensors[position] for step in steps]
        are_new = all(
            value[0] == "input" and value not in self.tokens[side] for side, value in enumerate(values)
        )
        alike = tensors[0].shape == tensors[1].shape and tensors[0].dtype == tensors[1].dtype
        if are_new and alike and _same_constants(*tensors):
            number = len(self.tokens[0])
            for side, value in enumerate(values):
                self.tokens[side][value] = ("input", number)
            return True
        return False


def _same_constants(left: Tensor, right: Tensor) -> bool:
    return (
        left.is_meta
        or right.is_meta
        or left.numel() > 1
        or type(left) is not Tensor
        or torch.equal(left, right)
    )


def _plain(step: Step) -> Any:
    """Return the arguments of an operator that are not tensors."""
    return _plain_value((step.call.args, sorted(step.call.kwargs.items())))


def _plain_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (tuple, list)):
        return [_plain_value(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    return value if isinstance(value, (str, float, bool, type(None))) else str(value)


def _shapes(step: Step) -> list[tuple[int, ...]]:
    return [tuple(int.__int__(size) for size in tensor.shape) for tensor in step.call.outputs]
