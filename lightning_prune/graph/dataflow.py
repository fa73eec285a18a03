"""The flow of values through one recorded forward: which operators the outputs depend on, and which values they read.

Tensors are mutable, so a value is more than a tensor: each operator that writes into one gives it a new value. With
values instead of tensors, two forwards can be compared operator by operator, also where one works in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.tracing.calls import ModuleCall, OperatorCall, Recording, tensors_in
from lightning_prune.utils.module_walk import tensors_of

__all__ = ["ADDITIONS", "Boundary", "Flow", "Step", "Value", "shares_memory"]

aten = torch.ops.aten
#: What a tensor holds at some moment: ("out", operator, index) of a result, ("write", operator, index) of a tensor
#: written into, ("through", value, *operators) of a view of one, ("model", id), or ("input", number).
Value = tuple[Any, ...]
#: Additions of a branch; the first operand of a difference is the stream.
ADDITIONS = frozenset((aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor))
#: They write into the running statistics in train mode, which their schema does not say.
_BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default}


@dataclass(eq=False)
class Step:
    """One operator: the values that it reads and makes, and the operators that made what it reads.

    Attributes:
        call: the operator.
        reads: the value of each of its tensors.
        sources: for each of its tensors, the operators that its value depends on directly.
        makes: the value of each of its results.
        in_place: whether it writes into one of its tensors.
        writes_model: whether it writes into a parameter or buffer.
    """

    call: OperatorCall
    reads: list[Value]
    sources: list[frozenset[int]]
    makes: list[Value] = field(default_factory=list)
    in_place: bool = False
    writes_model: bool = False

    @property
    def is_sum(self) -> bool:
        """Whether it adds or subtracts two tensors."""
        return self.call.op in ADDITIONS and len(self.call.tensors) == 2

    @property
    def is_difference(self) -> bool:
        """Whether it subtracts."""
        return self.call.op in (aten.sub.Tensor, aten.sub_.Tensor)

    @property
    def is_layout(self) -> bool:
        """Whether it only changes the layout of a tensor in memory, which depends on that of what is added."""
        if self.call.op == aten.as_strided_.default:  # of pooling to one pixel, for dimensions of size 1
            python = self.call.python.name if self.call.python else ""
            return python.startswith("adaptive_avg_pool") and self.call.tensors[0].shape[2:].numel() == 1
        return self.call.op == aten.clone.default

    @property
    def is_addition(self) -> bool:
        """Whether it adds or subtracts two tensors of the shape of its result."""
        shapes = {tuple(tensor.shape) for tensor in (*self.call.tensors, *self.call.outputs)}
        return self.is_sum and len(shapes) == 1


@dataclass(eq=False)
class Boundary:
    """One call of a module, and the values that go in and out.

    Attributes:
        call: the call.
        args: the values of the tensors in each positional argument.
        out: the values of the tensors in the result.
    """

    call: ModuleCall
    args: list[list[Value]] = field(default_factory=list)
    out: list[Value] = field(default_factory=list)


class Flow:
    """The values of one recorded forward.

    Args:
        recording: the forward.
        model: whose forward it is.

    Attributes:
        model: the network.
        steps: the operators, in order.
        outputs: the value of each tensor in the network's output, and the operators that made it.
        calls: the calls of modules, with the values of their tensors.
    """

    def __init__(self, recording: Recording, model: nn.Module) -> None:
        self.recording, self.model = recording, model
        self._model_ids = {id(tensor) for tensor in tensors_of(model)}
        self._root: dict[int, int] = {}  # id of a view -> that of the tensor whose memory it shares
        self._values: dict[int, Value] = {}
        self._definer: dict[int, int] = {}
        self._writers: defaultdict[int, list[int]] = defaultdict(
            list
        )  # of a root, since its last complete value
        self._seen: dict[int, int] = {}  # version of its root with which a tensor was last seen
        self._version: defaultdict[int, int] = defaultdict(int)
        self._num_inputs = 0
        self._kept_alive: list[Any] = [recording]
        self.steps: list[Step] = []
        self.calls = [Boundary(call) for call in recording.module_calls]
        begin, end = _by_number(self.calls, "start"), _by_number(self.calls, "end")
        for number in range(len(recording.calls) + 1):
            for boundary in end[number]:
                boundary.out = self._values_of(boundary.call.out)
            for boundary in begin[number]:
                boundary.args = [self._values_of(argument) for argument in boundary.call.args]
            for boundary in end[number]:
                if boundary.call.start == number:
                    boundary.out = self._values_of(boundary.call.out)
            if number < len(recording.calls):
                self._follow(recording.calls[number])
        self.outputs = [(self._value(tensor), self._sources(tensor)) for tensor in recording.outputs]

    def _values_of(self, argument: Any) -> list[Value]:
        return [self._value(tensor) for tensor in tensors_in(argument)]

    def _follow(self, call: OperatorCall) -> None:
        step = Step(call, [self._value(t) for t in call.tensors], [self._sources(t) for t in call.tensors])
        number = len(self.steps)
        self.steps.append(step)
        written = _written(call)
        for index, tensor in enumerate(written):
            self._write(tensor, number, index)
            step.in_place = True
            step.writes_model |= id(tensor) in self._model_ids
        shared = _shared(call)
        for index, out in enumerate(call.outputs):
            if any(out is tensor for tensor in written):
                continue
            source = shared if shared is not None and shared is not out else None
            if shared is out:  # an operator that returned its argument, such as `contiguous`
                continue
            self._root[id(out)] = self._root_of(source) if source is not None else id(out)
            self._values[id(out)] = ("out", number, index)
            self._definer[id(out)] = number
            self._seen[id(out)] = self._version[self._root[id(out)]]
        step.makes = [self._value(out) for out in call.outputs]

    def _root_of(self, tensor: Tensor) -> int:
        return self._root.get(id(tensor), id(tensor))

    def _write(self, tensor: Tensor, number: int, index: int) -> None:
        root = self._root_of(tensor)
        if root == id(tensor):
            self._writers[root] = [number]
            self._definer[root] = number
        else:
            self._writers[root].append(number)
        self._version[root] += 1
        self._values[id(tensor)] = ("write", number, index)
        self._seen[id(tensor)] = self._version[root]

    def _value(self, tensor: Tensor) -> Value:
        """Return the present value of a tensor."""
        key, root = id(tensor), self._root_of(tensor)
        if key not in self._values:
            self._values[key] = ("model", key) if key in self._model_ids else ("input", self._num_inputs)
            self._num_inputs += key not in self._model_ids
            self._seen[key] = 0
        if self._seen[key] != self._version[root]:  # written through another view of its memory
            self._values[key] = ("through", self._values[key], *self._writers[root])
            self._seen[key] = self._version[root]
        return self._values[key]

    def _sources(self, tensor: Tensor) -> frozenset[int]:
        own = {self._definer[id(tensor)]} if id(tensor) in self._definer else set()
        return frozenset(own.union(self._writers.get(self._root_of(tensor), ())))

    def is_written_after(self, boundary: Boundary) -> bool:
        """Return whether an operator works in place on what a module has returned."""
        roots = {self._root_of(tensor) for tensor in tensors_in(boundary.call.out)}
        return any(
            self._root_of(tensor) in roots
            for step in self.steps[boundary.call.end :]
            if step.in_place
            for tensor in _written(step.call)
        )

    # -- what depends on what ---------------------------------------------------------------------------------

    def closure(self, sources: Iterable[int], severed: Mapping[int, int] | None = None) -> set[int]:
        """Return the operators that values made by ``sources`` depend on, themselves included.

        Args:
            sources: operators.
            severed: addition -> the operand that is its result, since the other one is zero.
        """
        severed = severed or {}
        found: set[int] = set()
        stack = list(sources)
        while stack:
            number = stack.pop()
            if number in found:
                continue
            found.add(number)
            step = self.steps[number]
            operands = [step.sources[severed[number]]] if number in severed else step.sources
            for each in operands:
                stack += each - found
        return found

    @cached_property
    def calls_of(self) -> dict[str, list[Boundary]]:
        """Name of a module -> its calls."""
        calls: defaultdict[str, list[Boundary]] = defaultdict(list)
        for boundary in self.calls:
            calls[boundary.call.name].append(boundary)
        return dict(calls)

    def canonical(self, value: Value, severed: Mapping[int, int]) -> Value:
        """Return the value that ``value`` equals where the other operands of ``severed`` additions are zero.

        A copy has the value of what was copied.
        """
        while value[0] in ("out", "write"):
            step = self.steps[value[1]]
            if value[1] not in severed and not step.is_layout:
                break
            value = step.reads[severed.get(value[1], 0)]
        return value

    def live(
        self, severed: Mapping[int, int] | None = None, effects: Collection[int] | None = None
    ) -> set[int]:
        """Return the operators that the outputs depend on, and those that change the model.

        Args:
            severed: as in :meth:`closure`.
            effects: operators that write into the model; None: all of them.
        """
        ends = {number for _, sources in self.outputs for number in sources}
        return self.closure(ends | set(self.effects if effects is None else effects), severed)

    @cached_property
    def effects(self) -> set[int]:
        """The operators that write into parameters or buffers."""
        return {number for number, step in enumerate(self.steps) if step.writes_model}


def _by_number(calls: Iterable[Boundary], attribute: str) -> defaultdict[int, list[Boundary]]:
    found: defaultdict[int, list[Boundary]] = defaultdict(list)
    for boundary in calls:
        found[getattr(boundary.call, attribute)].append(boundary)
    return found


def _written(call: OperatorCall) -> list[Tensor]:
    """Return the tensors that an operator writes into."""
    written: list[Tensor] = []
    for argument in call.op._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = call.arg(argument.name)
            written += [value] if isinstance(value, Tensor) else []
            written += [x for x in value if isinstance(x, Tensor)] if isinstance(value, (list, tuple)) else []
    if call.op in _BATCH_NORMS and call.arg("training"):
        statistics = (call.arg("running_mean"), call.arg("running_var"))
        written += [value for value in statistics if isinstance(value, Tensor)]
    return written


def shares_memory(call: OperatorCall) -> bool:
    """Return whether an operator makes views of its first tensor."""
    return _shared(call) is not None and not _written(call)


def _shared(call: OperatorCall) -> Tensor | None:
    """Return the argument whose memory the results of a view share; None if they have their own."""
    if call.op == aten._unsafe_view.default:
        return call.tensors[0]
    if any(result.alias_info is not None for result in call.op._schema.returns):
        for argument in call.op._schema.arguments:
            if argument.alias_info is not None:
                value = call.arg(argument.name)
                return value if isinstance(value, Tensor) else None
    return None
