"""Check by numbers that each operator of the smaller network computes what the dense one did.

The rules *claim* which index of a result comes from which index of the operands. Here this claim is tested, one
operator at a time. Random operands of the dense shapes, zero where something was removed, go through the dense call;
the same operands without the removed parts go through the call of the smaller network. Both results must agree where
they survive.

The check uses no rule, so a wrong rule shows. It runs each operator alone, so activations with f(0) != 0 do not
disturb it. Dimensions without channels are cropped to make it fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.surgery.cropping import cropped_shapes
from lightning_prune.surgery.mask_check import masks_agree
from lightning_prune.surgery.number_check import changed_number, with_numbers_of
from lightning_prune.surgery.survivors import Survivors, at_least_float32
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.tracker import Labels, TracedOperator
from lightning_prune.utils.passing import is_passing

__all__ = ["added", "is_comparable", "mismatches"]

aten = torch.ops.aten
TOLERANCE = 1e-3
#: Operators with the same result; which of them torch runs depends on the strides of the operand.
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default}
_NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "rms_norm", "_fused_rms_norm")
#: Operators whose results are memory without defined values.
_UNDEFINED_VALUES = {
    aten.empty_like.default,
    aten.new_empty.default,
    aten.as_strided.default,
    aten.as_strided_.default,
}


def mismatches(
    dense: Sequence[TracedOperator],
    small: Sequence[TracedOperator],
    alive: NDArray[np.bool_],
    floats_change: bool = False,
) -> Iterator[tuple[TracedOperator, str]]:
    """Yield each dense operator whose result differs from that of the smaller network, and a description.

    Args:
        dense: operators of the dense network, in order.
        small: operators of the smaller network, in order.
        alive: which ids of the dense network survive; mask of shape (number of ids,).
        floats_change: whether the cut changes a number of channels that became a float; any operator may get it.
    """
    survivors = Survivors(alive)
    computed = {id(tensor) for operator in dense for tensor in operator.call.outputs}
    for before, after in _pairs(dense, small, survivors):
        if before.after_values and (after is None or not _same_sizes(before, after, survivors)):
            continue  # sizes and branches follow from values here, which the cut has changed
        if after is None:
            yield (
                before,
                "is not what the smaller network runs there: its code depends on a number of channels",
            )
            continue
        if (changed := changed_number(before, after, computed)) is not None:
            counts_change = any(survivors.mask([ids]) is not None for ids in before.counted)
            if not (floats_change or counts_change or before.after_values):
                yield before, changed
            after = with_numbers_of(before, after)
        if not survivors.affects(before) or not is_comparable(before.call):
            continue
        mixes = before.mixes_channels
        problem = _check_norm(before, after, survivors) if mixes else _check_call(before, after, survivors)
        if problem is not None:
            yield before, problem


def added(dense: Sequence[TracedOperator], small: Sequence[TracedOperator]) -> Iterator[TracedOperator]:
    """Yield the first operator of each line of code that only the smaller network runs.

    Where a dimension is left with one element, torch may run other operators; these are left out.
    """
    places = _by_place(dense)
    for place, operators in _by_place(small).items():
        if place not in places:
            yield from [each for each in operators if is_comparable(each.call) and not _has_one(each)][:1]


def _has_one(operator: TracedOperator) -> bool:
    """Return whether a tensor of the operator has a dimension of at most one channel."""
    shapes = [*operator.shapes, *(out.shape for out in operator.call.outputs)]
    return any(
        arrays and size <= 1
        for shape, labels in zip(shapes, operator.labels, strict=True)
        for size, arrays in zip(shape, labels, strict=True)
    )


def _pairs(
    dense: Sequence[TracedOperator], small: Sequence[TracedOperator], survivors: Survivors
) -> Iterator[tuple[TracedOperator, TracedOperator | None]]:
    """Pair the operators of both networks, by module and line of code, in order.

    Where a dimension is left with one element, torch may run other operators for the same line of the network's
    code. Such lines cannot be compared and are left out. Where other operators run for another reason, there is no
    partner: the code takes another branch if there are fewer channels.
    """
    dense_places, small_places = _by_place(dense), _by_place(small)
    for place, before in dense_places.items():
        after = small_places.get(place, [])
        if [_kind(operator.call) for operator in before] == [_kind(operator.call) for operator in after]:
            yield from zip(before, after, strict=True)
        elif not any(survivors.leaves_one(operator) for operator in before):
            yield before[0], None


def _same_sizes(before: TracedOperator, after: TracedOperator, survivors: Survivors) -> bool:
    """Whether both calls read tensors of the same sizes along all dimensions without channels."""
    return all(
        len(shape) == len(other)
        and all(
            n == m or survivors.mask(arrays) is not None
            for n, m, arrays in zip(shape, other, labels, strict=True)
        )
        for shape, other, labels in zip(before.shapes, after.shapes, before.labels, strict=False)
    )


def _by_place(operators: Sequence[TracedOperator]) -> dict[tuple[str, str], list[TracedOperator]]:
    places: dict[tuple[str, str], list[TracedOperator]] = {}
    for operator in operators:
        if operator.call.op is not aten.clone.default:  # whether torch needs a copy depends on strides
            places.setdefault((operator.call.module, operator.call.line), []).append(operator)
    return places


def _kind(call: OperatorCall) -> tuple[Any, int]:
    return ("reshape" if call.op in _RESHAPES else call.op), len(call.tensors)


def is_comparable(call: OperatorCall) -> bool:
    """Whether the call computes its results from its operands, is defined for all of them, and is not random."""
    seeded = torch.Tag.nondeterministic_seeded in call.op.tags and not _is_without_dropout(call)
    # Operators of torchvision take indices as floats, and read beyond their operands if these are random.
    undefined = call.op in _UNDEFINED_VALUES or call.op._schema.name.startswith("torchvision::")
    return bool(call.tensors and call.outputs) and not seeded and not undefined


def _is_without_dropout(call: OperatorCall) -> bool:
    """Whether the call is a dropout, or an attention, whose dropout is off: torch marks it as random all the same."""
    if call.op is aten.feature_dropout.default:
        return call.arg("train") is False
    names = [argument.name for argument in call.op._schema.arguments]
    return "attention" in call.op._opname and "dropout_p" in names and not call.arg("dropout_p")


def _check_call(before: TracedOperator, after: TracedOperator, survivors: Survivors) -> str | None:
    """Describe what is wrong with the smaller call; None if it is right."""
    count = len(before.shapes)
    operands, results = before.labels[:count], before.labels[count:]
    for shape, small_shape, labels in zip(before.shapes, after.shapes, operands, strict=True):
        if (problem := _check_shape(shape, small_shape, labels, survivors)) is not None:
            return problem
    if masks_agree(before, after, survivors.masks(operands), survivors.masks(results)):
        return None
    return _check_by_numbers(before, after, survivors)


def _check_by_numbers(before: TracedOperator, after: TracedOperator, survivors: Survivors) -> str | None:
    """Run both calls on the same random numbers, and describe the difference; None if there is none."""
    labels = before.labels[: len(before.shapes)]
    dense_operands = _random_operands(before, cropped_shapes(before, labels), labels, survivors)
    expected = _run_if_defined(before.call, dense_operands)
    if expected is None:
        return None
    operands = [survivors.restrict(x, dims) for x, dims in zip(dense_operands, labels, strict=True)]
    return _check_results(expected, after.call, operands, before.labels[len(labels) :], survivors)


def _random_operands(
    operator: TracedOperator,
    shapes: Sequence[Sequence[int]],
    labels: Sequence[Labels],
    survivors: Survivors,
) -> list[Tensor]:
    dtypes = [tensor.dtype for tensor in operator.call.tensors]
    values = [survivors.random_values(*each) for each in zip(shapes, dtypes, labels, strict=True)]
    if operator.call.op is aten._grouped_mm.default and len(values) > 2:
        values[2] = _ends_of_groups(len(values[0]), values[2])
    return values


def _ends_of_groups(num_rows: int, ends: Tensor) -> Tensor:
    """Return ends of groups that have all rows: the operator leaves rows without a group undefined."""
    return torch.linspace(0, num_rows, len(ends) + 1)[1:].round().to(ends.dtype)


def _check_norm(before: TracedOperator, after: TracedOperator, survivors: Survivors) -> str | None:
    """Check that a norm over channels with zeros for its removed parameters is zero exactly in removed channels.

    Its statistics change with the cut, so its values cannot be compared.
    """
    count = len(before.shapes)
    labels = [before.labels[0][:0], *before.labels[1:count]]  # the input itself gets no zeros
    cut_along = any(survivors.kept(arrays) is not None for dims in labels for arrays in dims)
    if before.call.op._opname not in _NORMS or not cut_along:
        return None
    if masks_agree(
        before, after, survivors.masks(before.labels[:count]), survivors.masks(before.labels[count:])
    ):
        return None
    results = _run_if_defined(before.call, _random_operands(before, before.shapes, labels, survivors))
    if results is None:
        return None
    out = results[0]
    kept = survivors.restrict(out, _scaled_labels(before, before.labels[count]))
    num_zeros, num_removed = int((out == 0).sum()), out.numel() - kept.numel()
    right = num_zeros == num_removed and bool((kept != 0).all())
    return None if right else "scales other channels than those of its parameters"


def _scaled_labels(norm: TracedOperator, labels: Labels) -> Labels:
    """Labels of a norm's result, only along the dimensions along which it has parameters."""
    rank = len(labels)
    layer_norm = norm.call.op._opname not in ("native_batch_norm", "native_group_norm")
    dims = range(rank - len(norm.call.args[1]), rank) if layer_norm else [1]
    return tuple(arrays if dim in dims else () for dim, arrays in enumerate(labels))


def _check_shape(
    shape: torch.Size, small_shape: torch.Size, labels: Labels, survivors: Survivors
) -> str | None:
    expected = [
        size if (mask := survivors.mask(arrays)) is None else int(mask.sum())
        for size, arrays in zip(shape, labels, strict=True)
    ]
    if expected == list(small_shape):
        return None
    return f"reads an operand of shape {tuple(small_shape)}, expected {tuple(expected)}"


def _check_results(
    expected: list[Tensor],
    call: OperatorCall,
    operands: list[Tensor],
    labels: Sequence[Labels],
    survivors: Survivors,
) -> str | None:
    """Run the smaller call, and describe how its results differ from the surviving part of ``expected``."""
    try:
        results = _run(call, operands)
    except RuntimeError as error:
        if is_passing(error):
            raise
        return f"raises for the smaller operands: {error}"
    for dense_result, result, dims in zip(expected, results, labels, strict=False):
        if not any(dims) and dense_result.shape != result.shape:
            continue  # without labels nothing is known of this result; a check of its reader will fail if it is wrong
        if (problem := _difference(survivors.restrict(dense_result, dims), result)) is not None:
            return problem
    return None


def _difference(expected: Tensor, result: Tensor) -> str | None:
    if expected.shape != result.shape:
        return f"has a result of shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel() or not expected.dtype.is_floating_point:
        return None
    scale = expected.abs().nan_to_num().max().clamp_min(1e-6)
    error = float((expected - result).abs().nan_to_num().max() / scale)
    return f"differs by {error:.2g} of its largest value" if error > TOLERANCE else None


def _run_if_defined(call: OperatorCall, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Repeat the recorded call with other tensors; None if it is not defined for such values, or not on the CPU."""
    try:
        return _run(call, tensors)
    except RuntimeError as error:
        if is_passing(error):
            raise
        return None


def _run(call: OperatorCall, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Repeat the recorded call with other tensors, on the CPU."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    operands = iter(tensors)
    leaves = [next(operands).clone() if isinstance(x, Tensor) else _cpu_argument(x) for x in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    operator = aten.reshape.default if call.op in _RESHAPES else call.op
    with torch.no_grad():
        results = tree_flatten(operator(*args, **kwargs))[0]
    return [leaf for leaf in results if isinstance(leaf, Tensor)]


def _cpu_argument(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return at_least_float32(leaf)
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
