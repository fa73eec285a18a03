"""One small function per ATen operator (level 1).

A rule is given the recorded :class:`~lightning_prune.tracing.calls.OperatorCall` and the
:class:`~lightning_prune.tracing.tracker.Tracker`; it ties ids, pins them, registers costs, and labels the results.
Operators without a rule pin every id they touch: they can make us prune less, never wrongly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload, OpOverloadPacket

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.tracker import TracedOperator, Tracker

__all__ = ["RULES", "Rule", "follow", "rule", "same_labels"]

Rule = Callable[[OperatorCall, Tracker], None]
RULES: dict[OpOverload, Rule] = {}
UNKNOWN = "passes through an operator without a rule"


def rule(*operators: OpOverload | OpOverloadPacket) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators; a packet (``aten.add``) stands for all its overloads.

    Raises:
        ValueError: an operator has a rule already.

    Example:
        >>> from lightning_prune.tracing.rules import RULES, rule, same_labels
        >>> op = torch.ops.aten.renorm.default
        >>> @rule(op)
        ... def renorm(call, tracker):
        ...     same_labels(call, tracker)
        >>> RULES.pop(op) is renorm
        True
    """

    def register(function: Rule) -> Rule:
        for overload in _overloads(operators):
            if overload in RULES:
                raise ValueError(f"{overload} has a rule already: {RULES[overload].__name__}")
            RULES[overload] = function
        return function

    return register


def _overloads(operators: tuple[OpOverload | OpOverloadPacket, ...]) -> list[OpOverload]:
    found: list[OpOverload] = []
    for operator in operators:
        if isinstance(operator, OpOverloadPacket):
            found += [getattr(operator, name) for name in operator.overloads()]
        else:
            found.append(operator)
    return found


def follow(call: OperatorCall, tracker: Tracker) -> None:
    """Apply the rule of one recorded operator."""
    tracker.call = call
    read, statistics = [tracker.labels(tensor) for tensor in call.tensors], len(tracker.ties.statistics)
    _apply(call, tracker)
    written = [tracker.labels(tensor) for tensor in call.outputs]
    mixed = len(tracker.ties.statistics) > statistics
    shapes = [tensor.shape for tensor in call.tensors]
    tracker.followed.append(TracedOperator(call, [*read, *written], shapes, mixed))
    tracker.call = None


def _apply(call: OperatorCall, tracker: Tracker) -> None:
    function = RULES.get(call.op)
    if function is None and torch.Tag.pointwise in call.op.tags:
        function = RULES[torch.ops.aten.add.Tensor]
    if function is None:
        if any(arrays for tensor in call.tensors for arrays in tracker.labels(tensor)):
            tracker.unsupported.setdefault(call.op.name(), []).append(call.module)
        tracker.pin_all(call.tensors, UNKNOWN)
    else:
        function(call, tracker)


def same_labels(call: OperatorCall, tracker: Tracker) -> None:
    """Every result of the first tensor's shape carries its labels."""
    source = call.tensors[0]
    for out in call.outputs:
        if out.shape == source.shape:
            tracker.label(out, tracker.labels(source))
