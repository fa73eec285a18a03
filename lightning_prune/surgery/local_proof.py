"""Prove a cut operator by operator, without a forward of the smaller network, where its code cannot go another way.

The smaller network runs the operators of the dense trace, in the same order and with the same numbers, if its code
has read no size that the cut changes (:mod:`~lightning_prune.tracing.size_reads`), and its modules hold what they
held. Then it is right if each operator alone gives the surviving part of its dense result for the surviving parts of
its operands. For the operators of common networks that follows from masks of what survives, by the checks that the
full proof makes too (:mod:`~lightning_prune.surgery.mask_check`), and from the tensors as they are after the cut.

What is not clearly covered is left to the full proof, which traces the smaller network: the answer here is never that
a cut is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.surgery.mask_check import CHECKS, UNTAGGED_POINTWISE, pointwise_check
from lightning_prune.surgery.masks import Mask, Masks, all_kept, same_masks, surviving_shape
from lightning_prune.surgery.numerical_check import is_comparable
from lightning_prune.surgery.passed_sizes import (
    Changes,
    gets_changes,
    gets_changes_in_place_only,
    with_groups,
    with_norm_groups,
    with_normalised,
)
from lightning_prune.surgery.predicted_costs import costs_as_predicted
from lightning_prune.surgery.survivors import Survivors
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.hidden_code import hides_reads
from lightning_prune.tracing.rules.numbers import scalars
from lightning_prune.tracing.size_reads import GUARDED
from lightning_prune.tracing.tracker import TracedOperator, Tracker
from lightning_prune.utils.module_walk import modules_of

__all__ = ["is_proven"]

aten = torch.ops.aten
_CONVOLUTION, _EXPAND = aten.convolution.default, aten.expand.default
_LAYER_NORM, _GROUP_NORM = aten.native_layer_norm.default, aten.native_group_norm.default
_PAD, _VECTOR_NORM = aten.constant_pad_nd.default, aten.linalg_vector_norm.default
#: Operators that take statistics of what is left, and whose checks know that.
_STATISTICS = (_LAYER_NORM, _GROUP_NORM, aten.mean.dim, _VECTOR_NORM)
#: Operator -> function that gives its call in the smaller network, with the numbers that the code passes there.
_WITH_SIZES = {_CONVOLUTION: with_groups, _LAYER_NORM: with_normalised, _GROUP_NORM: with_norm_groups}
#: Operators whose results have the sizes that the code passes, and no part of their operand.
_FACTORIES = (aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
#: Python-level calls that compute the sizes of a reshape within torch, from the tensor itself.
_SIZED_BY_TORCH = ("flatten", "linear", "matmul")
#: Operators with a result of the shape of their operand, under the name of the call that led to them: the noise of a
#: dropout, and a pooling to one pixel that puts the strides of its result in order.
_LIKE_THEIR_OPERAND = {
    (aten.empty_like.default, "dropout"),
    (aten.bernoulli_.float, "dropout"),
    (aten.div_.Scalar, "dropout"),
    (aten.as_strided_.default, "adaptive_avg_pool2d"),
}


def is_proven(graph: ChannelGraph, kept: NDArray[np.bool_], changes: Changes) -> bool:
    """Return whether the cut network computes the surviving part of the dense one; False if that is not clear.

    Args:
        graph: graph of the dense network, with its trace; the network has been cut.
        kept: mask over units, shape (num_units,).
        changes: the attributes that surgery has set.
    """
    evidence = graph.evidence
    assert evidence is not None
    tracker, survives = evidence.tracker, np.append(kept, True)[evidence.unit_of]
    if not survives[evidence.pinned].all() or not _runs_the_same(tracker, changes):
        return False
    survivors = Survivors(survives[evidence.components])
    if _reads_what_is_cut(tracker, survivors, changes):
        return False
    check = _Check(tracker, survivors, changes)
    if not all(map(check.is_right, tracker.operators)) or not check.knows_outputs():
        return False
    if not all(map(check.is_whole, tracker.returned)):
        return False
    return costs_as_predicted(graph, evidence, survivors, kept)


def _runs_the_same(tracker: Tracker, changes: Changes) -> bool:
    """Whether nothing but the sizes in ``changes`` can make the code run other operators than in the dense trace."""
    if (
        tracker.branches_on_values
        or tracker.state is None
        or any(each.after_values for each in tracker.operators)
    ):
        return False
    if not all(name in GUARDED for _, name in changes):
        return False
    return tracker.state.is_that_of(tracker.model, changes.keys()) and not hides_reads(tracker.model)


def _reads_what_is_cut(tracker: Tracker, survivors: Survivors, changes: Changes) -> bool:
    """Whether the code has read a size that the cut has changed, or may have done so."""
    modules = set(map(id, modules_of(tracker.model)))
    if any(
        reads.unclear or any(owner not in modules for owner, _ in reads.attributes) for reads in tracker.reads
    ):
        return True
    if any(survivors.mask([ids]) is not None for ids in tracker.float_ids):
        return True
    if any(not reads.attributes.isdisjoint(changes) for reads in tracker.reads):
        return True
    read = [each for reads in tracker.reads for each in reads.dims if each[1]]
    asked = [each for reads in tracker.reads for each in reads.emptiness]
    followed = _followed(tracker) if read or asked else frozenset()
    for tensor, dims in read:
        labels = tracker.labels(tensor)
        if id(tensor) not in followed or any(survivors.mask(labels[dim]) is not None for dim in dims):
            return True
    for tensor, dim in asked:
        mask = survivors.mask(tracker.labels(tensor)[dim])
        if id(tensor) not in followed or (mask is not None and not mask.any()):
            return True
    return False


def _followed(tracker: Tracker) -> set[int]:
    """Return the ids of all tensors that have labels: those that operators read or return, parameters and buffers."""
    calls = [operator.call for operator in tracker.operators]
    return {id(tensor) for _, tensor in tracker.named_tensors}.union(
        *(map(id, call.tensors) for call in calls), *(map(id, call.outputs) for call in calls)
    )


class _Check:
    """Checks operators in their order.

    Args:
        tracker: of the dense trace.
        survivors: what survives.
        changes: the attributes that surgery has set.
    """

    def __init__(self, tracker: Tracker, survivors: Survivors, changes: Changes) -> None:
        self.tracker, self.survivors, self.changes = tracker, survivors, changes
        # id of a tensor -> masks of its dimensions: of those that surgery has cut, and those that operators return
        self.known = {
            id(tensor): [survivors.mask((ids,)) for ids in tracker.sources[name].values()]
            for name, tensor in tracker.named_tensors
        }
        self.inputs = {id(tensor) for reads in tracker.reads for tensor in reads.ends[0]}
        self.outputs = [tensor for reads in tracker.reads for tensor in reads.ends[1]]

    def knows_outputs(self) -> bool:
        """Whether what the network returns was made by the operators that have been checked."""
        return all(map(self._is_known, self.outputs))

    def _is_known(self, tensor: Tensor) -> bool:
        """Whether no tensor without data comes from code that nothing sees, such as another thread."""
        made = tensor.is_meta or isinstance(tensor, FakeTensor)
        return not made or id(tensor) in self.known or id(tensor) in self.inputs

    def is_right(self, operator: TracedOperator) -> bool:
        """Whether masks show that the operator gives the surviving part of its dense result."""
        count, call = len(operator.shapes), operator.call
        masks = self.survivors.masks(operator.labels)
        operands, results = masks[:count], masks[count:]
        if not self._reads_what_is_known(operator, operands):
            return False
        self.known.update(zip(map(id, call.outputs), results, strict=True))
        if not gets_changes_in_place_only(call, self.changes):
            return False
        if all(mask is None for dims in masks for mask in dims) and not gets_changes(call, self.changes):
            return True  # it reads and writes what it did
        if (known := self._by_origin(operator, operands, results)) is not None:
            return known and not _leaves_one(masks)
        if operator.mixes_channels and not operator.only_counts and call.op not in _STATISTICS:
            return False
        if not _is_plain(call) or (_leaves_one(masks) and call.op is not _CONVOLUTION):
            return False
        if any(self.survivors.mask([ids]) is not None for ids in operator.counted):
            return False
        check, variable = CHECKS.get(call.op, (pointwise_check(call.op), ()))
        if check is None or (small := _smaller(operator, variable, results, self.changes)) is None:
            return False
        return check(operator, small, operands, results)

    def _by_origin(self, operator: TracedOperator, operands: Masks, results: Masks) -> bool | None:
        """Whether an operator is right that is known by the Python-level call that led to it; None for all others."""
        call, out = operator.call, results[0] if results else ()
        name = call.python.name if call.python else ""
        if call.op in _FACTORIES:
            return name == call.op._opname and all_kept(out)
        if (call.op, name) in _LIKE_THEIR_OPERAND:
            return len(operands) == 1 and all(map(same_masks, operands[0], out))
        if call.op is _EXPAND and name == "expand_as":
            assert call.python is not None
            other = self.known.get(id(call.python.args[-1]))
            return (
                other is not None
                and len(other) == len(out)
                and _is_expanded(operator, operands[0], out, other)
            )
        return None

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether a tensor that leaves the network has lost nothing."""
        masks = [*self.known.get(id(tensor), ()), *map(self.survivors.mask, self.tracker.labels(tensor))]
        return all(mask is None for mask in masks)

    def _reads_what_is_known(self, operator: TracedOperator, operands: Masks) -> bool:
        """Whether each operand has lost what the operator that made it, or surgery, has taken from it."""
        for tensor, shape, masks in zip(operator.call.tensors, operator.shapes, operands, strict=True):
            known = self.known.get(id(tensor))
            if known is None:
                if any(mask is not None for mask in masks) or not self._is_known(tensor):
                    return False
            elif len(known) != len(masks) or not all(map(same_masks, known, masks)):
                return False
            if not tensor.is_meta and list(tensor.shape) != surviving_shape(shape, masks):
                return False
        return True


def _is_expanded(
    operator: TracedOperator, operand: Sequence[Mask], out: Sequence[Mask], other: Sequence[Mask]
) -> bool:
    """Whether a tensor was expanded to what is left of another one; all elements along a new dimension are equal."""
    shape, wide = operator.shapes[0], operator.call.outputs[0].shape
    pairs = zip(reversed(shape), reversed(wide), reversed(operand), reversed(out), strict=False)
    return all(map(same_masks, out, other)) and all(
        same_masks(mask, left) if size == full else size == 1 and mask is None
        for size, full, mask, left in pairs
    )


def _leaves_one(masks: Masks) -> bool:
    """Whether a dimension has at most one element left, which torch and the rules may take for another one."""
    return any(mask is not None and np.count_nonzero(mask) <= 1 for dims in masks for mask in dims)


def _is_plain(call: OperatorCall) -> bool:
    """Whether an operator computes its results from its operands, and got its numbers from the network's code."""
    if call.python is None or not is_comparable(call):
        return False
    if call.op is _PAD:  # other calls compute the widths
        return call.python.name in ("pad", "constant_pad_nd")
    if call.op in CHECKS and call.op not in UNTAGGED_POINTWISE:
        return True
    if call.op is _VECTOR_NORM:
        return call.python.name in ("norm", "vector_norm", "linalg_vector_norm")
    # Torch may have computed a number from sizes where a call is made of several operators.
    return call.python.name.strip("_") == call.op._opname.strip("_") or not any(True for _ in scalars(call))


def _smaller(
    operator: TracedOperator, variable: Sequence[int], results: Masks, changes: Changes
) -> TracedOperator | None:
    """Return the call with the numbers that the smaller network passes; None if they are not known."""
    op = operator.call.op
    if not variable:
        return operator
    if op in _WITH_SIZES:
        return _WITH_SIZES[op](operator, changes)
    if op in _RESHAPES or op is _EXPAND:
        return operator if _sizes_follow(operator, results[0]) else None
    return None


def _sizes_follow(operator: TracedOperator, result: Sequence[Any]) -> bool:
    """Whether the sizes of a reshape follow the tensor: torch computes those that the cut changes."""
    call = operator.call
    assert call.python is not None
    if call.python.name in _SIZED_BY_TORCH:
        return True
    if call.python.name not in ("view", "reshape", "expand"):
        return False
    passed = [*call.python.args[1:], *call.python.kwargs.values()]
    sizes = list(passed[0]) if len(passed) == 1 and isinstance(passed[0], (tuple, list)) else passed
    if len(sizes) != len(result) or not all(isinstance(size, int) for size in sizes):
        return False
    return all(mask is None or size == -1 for size, mask in zip(sizes, result, strict=True))
