"""Check common operators by their kept-index masks, without arithmetic.

For a convolution, a matrix product, a batch norm or a pointwise operator it is known which dimensions of operands and
result must have lost the same indices. Comparing masks is exact, and about a hundred times faster than the arithmetic
of :mod:`~lightning_prune.surgery.numerical_check`. Like that module, this one does not use the rules of tracing. If
an operator or its arguments are not covered, or the masks differ, the answer is ``False``, and numbers decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from lightning_prune.surgery import mask_check_views  # noqa: F401 - registers its checks
from lightning_prune.surgery.mask_check_arithmetic import UNTAGGED_POINTWISE, pointwise
from lightning_prune.surgery.mask_registry import CHECKS, MaskCheck
from lightning_prune.surgery.masks import Masks, all_kept, surviving_shape
from lightning_prune.tracing.calls import OperatorCall, operator_tensors
from lightning_prune.tracing.tracker import TracedOperator

__all__ = ["CHECKS", "UNTAGGED_POINTWISE", "masks_agree", "pointwise_check"]


def masks_agree(dense: TracedOperator, small: TracedOperator, operands: Masks, results: Masks) -> bool:
    """Whether the masks alone prove that the smaller call gives the surviving part of the dense result.

    Args:
        dense: the call in the dense network. Its parameters have been cut since; ``dense.shapes`` are the old shapes.
        small: the call in the smaller network, with operands of the surviving shapes.
        operands: masks of the tensors that the dense call reads.
        results: masks of its results, according to the labels.
    """
    check, variable = CHECKS.get(dense.call.op, (pointwise_check(dense.call.op), ()))
    if check is None or _constant_arguments(dense.call, variable) != _constant_arguments(
        small.call, variable
    ):
        return False
    if not check(dense, small, operands, results):
        return False
    outputs = zip(dense.call.outputs, small.call.outputs, results, strict=True)
    # Further results may have no labels, hence no masks: where one is read, the check of its reader fails.
    return all(
        list(small_output.shape) == surviving_shape(output.shape, masks) or (i > 0 and all_kept(masks))
        for i, (output, small_output, masks) in enumerate(outputs)
    )


def pointwise_check(op: OpOverload) -> MaskCheck | None:
    """Return the check of operators that torch tags as pointwise; None for others."""
    return pointwise if torch.Tag.pointwise in op.tags else None


def _constant_arguments(call: OperatorCall, variable: Sequence[int]) -> dict[int | str, Any]:
    """Arguments that are not tensors, without those at the positions ``variable``."""
    arguments: dict[int | str, Any] = dict(enumerate(call.args))
    arguments.update(call.kwargs)
    return {at: x for at, x in arguments.items() if at not in variable and not operator_tensors([x])}
