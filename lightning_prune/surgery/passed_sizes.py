"""Find the numbers that the smaller network passes to an operator, where they are attributes that surgery has set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.traced_int import Attribute, TracedInt, evaluate, leaves
from lightning_prune.tracing.tracker import TracedOperator

__all__ = [
    "Changes",
    "gets_changes",
    "gets_changes_in_place_only",
    "with_groups",
    "with_norm_groups",
    "with_normalised",
]

aten = torch.ops.aten
#: id and name of a module's attribute -> its value after the cut
Changes = Mapping[tuple[int, str], Any]
_CONVOLUTION, _LAYER_NORM = aten.convolution.default, aten.native_layer_norm.default
_GROUP_NORM = aten.native_group_norm.default
#: Operators that may get a size attribute -> its position and name in the Python-level call.
_SIZE_ARGUMENTS = {
    _CONVOLUTION: (6, "groups"),
    _LAYER_NORM: (1, "normalized_shape"),
    _GROUP_NORM: (1, "num_groups"),
}


def gets_changes(call: OperatorCall, changes: Changes) -> bool:
    """Whether the network's code passes an attribute to the operator that the cut has changed."""
    if call.op not in _SIZE_ARGUMENTS or call.python is None:
        return False
    return any(_depends(each, changes) for each in (*call.python.args, *call.python.kwargs.values()))


def gets_changes_in_place_only(call: OperatorCall, changes: Changes) -> bool:
    """Whether an operator that gets changed attributes takes them where they are checked, not, say, as a stride."""
    if not gets_changes(call, changes):
        return True
    assert call.python is not None
    position, name = _SIZE_ARGUMENTS[call.op]
    others = [each for at, each in enumerate(call.python.args) if at != position]
    others += [each for key, each in call.python.kwargs.items() if key != name]
    return not any(_depends(each, changes) for each in others)


def _depends(value: Any, changes: Changes) -> bool:
    """Whether a number, or one of several, is made of an attribute that the cut has changed."""
    if isinstance(value, (tuple, list)):
        return any(_depends(each, changes) for each in value)
    if not isinstance(value, TracedInt):
        return False
    return any(
        isinstance(leaf, Attribute) and (id(leaf.owner), leaf.name) in changes for leaf in leaves(value)
    )


def with_groups(operator: TracedOperator, changes: Changes) -> TracedOperator | None:
    """Return a convolution with the number of groups that the smaller network passes; None if it is not known."""
    call = operator.call
    assert call.python is not None
    passed = _size_argument(call, 1)
    if call.python.name not in ("conv1d", "conv2d", "conv3d"):
        return operator if call.args[8] == 1 and call.python.name.startswith("conv") and passed == 1 else None
    groups = _value_of(passed, changes)
    if groups is None or groups == call.args[8]:
        return None if groups is None else operator
    return replace(operator, call=replace(call, args=(*call.args[:8], groups)))


def with_normalised(operator: TracedOperator, changes: Changes) -> TracedOperator | None:
    """Return a layer norm with the sizes that the smaller network passes; None if they are not known."""
    call = operator.call
    assert call.python is not None
    passed = _size_argument(call)
    if call.python.name != "layer_norm" or not isinstance(passed, (tuple, list)):
        return None
    sizes = [_value_of(each, changes) for each in passed]
    if None in sizes or len(sizes) != len(call.args[1]):
        return None
    return replace(operator, call=replace(call, args=(call.args[0], sizes, *call.args[2:])))


def with_norm_groups(operator: TracedOperator, changes: Changes) -> TracedOperator | None:
    """Return a group norm with the number of groups that the smaller network passes; None if it is not known."""
    call = operator.call
    assert call.python is not None
    groups = _value_of(_size_argument(call), changes) if call.python.name == "group_norm" else None
    if groups is None:
        return None
    return replace(operator, call=replace(call, args=(*call.args[:6], groups, *call.args[7:])))


def _size_argument(call: OperatorCall, default: Any = None) -> Any:
    """Return what the code passed as the size that the operator may get of an attribute."""
    assert call.python is not None
    position, name = _SIZE_ARGUMENTS[call.op]
    args = call.python.args
    return args[position] if len(args) > position else call.python.kwargs.get(name, default)


def _value_of(passed: Any, changes: Changes) -> int | None:
    """Return the value after the cut of a number that the code passed; None if not only attributes make it."""
    if not isinstance(passed, TracedInt):
        return passed if isinstance(passed, int) else None
    values: dict[Any, int] = {}
    for leaf in leaves(passed):
        if not isinstance(leaf, Attribute):
            return None
        value = _present(leaf, changes)
        if not isinstance(value, int):
            return None
        values[leaf.key] = value
    return evaluate(passed, values)


def _present(leaf: Attribute, changes: Changes) -> Any:
    """Return the value of an attribute, or of one of its items, after the cut; None if it is not known."""
    key = (id(leaf.owner), leaf.name)
    if key not in changes:
        return leaf.value
    value = changes[key]
    if leaf.item is None:
        return value
    known = type(value) in (tuple, list) and isinstance(leaf.item, int) and 0 <= leaf.item < len(value)
    return value[leaf.item] if known else None
