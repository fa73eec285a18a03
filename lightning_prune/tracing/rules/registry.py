"""Registry of rules: one small function per ATen operator.

A rule receives an :class:`~lightning_prune.tracing.calls.OperatorCall`, which holds the operator's arguments and
results, and the :class:`~lightning_prune.tracing.tracker.Tracker`. It ties or pins channel ids, registers costs, and
labels the results with ids. An operator without a rule pins all ids of its arguments: fewer channels can be pruned
then, but never the wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload, OpOverloadPacket

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.rules.numbers import mark_sized_numbers, pass_constants_on
from lightning_prune.tracing.tracker import TracedOperator, Tracker
from lightning_prune.tracing.value_sizes import is_read_as_number, size_depends_on_values

__all__ = ["RULES", "Rule", "apply_rule", "rule", "rule_by_name", "same_labels"]

Rule = Callable[[OperatorCall, Tracker], None]
RULES: dict[OpOverload, Rule] = {}
#: Rules of operators of libraries that may not be imported yet, by name without overload.
RULES_BY_NAME: dict[str, Rule] = {}
WITHOUT_RULE = "passes through an operator without a rule"


def rule(*operators: OpOverload | OpOverloadPacket) -> Callable[[Rule], Rule]:
    """Return a decorator that registers a function as the rule of ATen operators.

    A rule describes how an operator treats channels. It is called once for each call of the operator, as
    ``function(call, tracker)``, and returns nothing. ``call.args`` holds the arguments of the operator,
    ``call.tensors`` the tensors among them, ``call.out`` the result. Most rules need four methods of the tracker:

    - ``tracker.labels(tensor)``: for each dimension of a tensor, the arrays of channel ids along it; an empty tuple
      for a dimension without channels (batch, pixels).
    - ``tracker.label(call.out, labels)``: set these arrays for a result. Each must be as long as its dimension.
    - ``tracker.tie(a, b)``: channels ``a[i]`` and ``b[i]`` are kept or removed together.
    - ``tracker.pin(ids, reason)``: these channels must not be removed; ``graph.explain`` shows the reason.

    If the channels come out as they came in, :func:`same_labels` is the whole rule. A wrong rule does not lead to a
    wrong network: :func:`~lightning_prune.prune_` compares each operator before and after the cut, and undoes the cut
    if a result differs.

    Args:
        *operators: ATen overloads (``torch.ops.aten.renorm.default``) or packets (``torch.ops.aten.add``); a packet
            stands for all its overloads.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        ValueError: an operator already has a rule.

    Example:
        ``torch.renorm`` rescales each slice along a dimension. Its result has the channels of its input. Without a
        rule they are pinned:

        >>> import lightning_prune as lp
        >>> from torch import nn
        >>> class Renorm(nn.Module):
        ...     def forward(self, x):
        ...         return x.renorm(2, 1, 1.0)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), Renorm(), nn.Conv2d(8, 2, 1))
        >>> image = torch.zeros(1, 3, 8, 8)
        >>> len(lp.trace(net, image).prunable)
        0

        With a rule they are free:

        >>> op = torch.ops.aten.renorm.default
        >>> @lp.rule(op)
        ... def renorm(call, tracker):
        ...     tracker.label(call.out, tracker.labels(call.args[0]))
        >>> len(lp.trace(net, image).prunable)
        8

        Only for this example: remove the rule again.

        >>> RULES.pop(op) is renorm
        True
    """

    def register(function: Rule) -> Rule:
        for overload in _overloads(operators):
            if overload in RULES:
                raise ValueError(f"{overload} already has a rule: {RULES[overload].__name__}")
            RULES[overload] = function
        return function

    return register


def rule_by_name(*names: str) -> Callable[[Rule], Rule]:
    """Return a decorator like :func:`rule`, for operators given as ``"library::operator"``."""

    def register(function: Rule) -> Rule:
        RULES_BY_NAME.update(dict.fromkeys(names, function))
        return function

    return register


def _overloads(operators: tuple[OpOverload | OpOverloadPacket, ...]) -> list[OpOverload]:
    overloads: list[OpOverload] = []
    for operator in operators:
        if isinstance(operator, OpOverloadPacket):
            overloads += [getattr(operator, name) for name in operator.overloads()]
        else:
            overloads.append(operator)
    return overloads


def apply_rule(call: OperatorCall, tracker: Tracker) -> None:
    """Apply the rule of one recorded operator, and append the operator with all its labels to the tracker."""
    tracker.call = call
    argument_labels = [tracker.labels(tensor) for tensor in call.tensors]
    num_statistics = len(tracker.ties.statistics)
    mark_sized_numbers(call, tracker)
    counted = tuple(tracker.ties.statistics[num_statistics:])
    _apply(call, tracker)
    pass_constants_on(call, tracker)
    # A rule may find out what an operand without labels follows, such as a constant that was expanded.
    argument_labels = [
        labels if any(labels) else tracker.labels(tensor)
        for labels, tensor in zip(argument_labels, call.tensors, strict=True)
    ]
    result_labels = [tracker.labels(tensor) for tensor in call.outputs]
    mixed = len(tracker.ties.statistics) - num_statistics
    shapes = [tensor.shape for tensor in call.tensors]
    labels = [*argument_labels, *result_labels]
    tracker.operators.append(
        TracedOperator(call, labels, shapes, mixed > 0, tracker.met_values, mixed, counted)
    )
    tracker.met_values |= depends_on_values(call)
    tracker.call = None


def depends_on_values(call: OperatorCall) -> bool:
    """Return whether the size of the result, or the Python number that it is, depends on the values of operands."""
    return is_read_as_number(call.op) or size_depends_on_values(call.op, call.args, call.kwargs)


def _apply(call: OperatorCall, tracker: Tracker) -> None:
    function = RULES.get(call.op) or RULES_BY_NAME.get(call.op._schema.name)
    if function is None and torch.Tag.pointwise in call.op.tags:
        function = RULES[torch.ops.aten.add.Tensor]
    if function is None:
        if any(arrays for tensor in call.tensors for arrays in tracker.labels(tensor)):
            tracker.unsupported.setdefault(call.op.name(), []).append(call.module)
        tracker.pin_all(call.tensors, WITHOUT_RULE)
    else:
        function(call, tracker)


def same_labels(call: OperatorCall, tracker: Tracker) -> None:
    """Give the labels of the first tensor argument to every result of the same shape.

    This is the rule of all operators that keep the channels in place, such as ``clone`` or ``dropout``.
    """
    source = call.tensors[0]
    for out in call.outputs:
        if out.shape == source.shape:
            tracker.label(out, tracker.labels(source))
