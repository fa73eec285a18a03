"""Compare the numbers that operators receive before and after a cut: some follow from numbers of channels.

A trace follows sizes through the arithmetic of Python integers. Where a network's code takes another way (numpy, a
cache, a global dictionary), the trace does not see that a number depends on a size. The smaller network shows it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from lightning_prune.tracing.rules.numbers import scalars
from lightning_prune.tracing.tracker import TracedOperator
from lightning_prune.utils.modules import same_values

__all__ = ["changed_number", "with_numbers_of"]

aten = torch.ops.aten
#: Constants of more elements are not compared.
_MAX_CONSTANT = 4096


def changed_number(
    before: TracedOperator, after: TracedOperator, computed: Collection[int] = frozenset()
) -> str | None:
    """Describe a number, or a constant tensor, that the cut has changed; None if there is none.

    Args:
        before: the call in the dense network.
        after: the call in the smaller one.
        computed: ids of the dense network's tensors that an operator has computed, and that are no constants.
    """
    old, new = dict(scalars(before.call)), dict(scalars(after.call))
    for key, value in old.items():
        if key in new and not _equal(value, new[key]):
            return f"gets the number {new[key]:.6g}, and {value:.6g} in the dense network"
    for constant, other, labels in zip(before.call.tensors, after.call.tensors, before.labels, strict=False):
        made_by_code = before.call.op is aten.lift_fresh.default or id(constant) not in computed
        if made_by_code and not any(labels) and _are_constants(constant, other) and _differ(constant, other):
            return "gets a constant that the cut has changed"
    return None


def with_numbers_of(before: TracedOperator, after: TracedOperator) -> TracedOperator:
    """Return the smaller call with the numbers of the dense one, since both are to be compared for the same ones."""
    args, kwargs = list(after.call.args), dict(after.call.kwargs)
    for key, value in scalars(before.call):
        if isinstance(key, int) and key < len(args):
            args[key] = value
        elif isinstance(key, str) and key in kwargs:
            kwargs[key] = value
    return replace(after, call=replace(after.call, args=tuple(args), kwargs=kwargs))


def _equal(old: float, new: float) -> bool:
    return old == new or (old != old and new != new)


def _are_constants(*tensors: Tensor) -> bool:
    """Return whether tensors have values that can be compared, and are no parameters."""
    return all(type(x) is Tensor and not x.is_meta and x.numel() <= _MAX_CONSTANT for x in tensors)


def _differ(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and not same_values(old, new)
