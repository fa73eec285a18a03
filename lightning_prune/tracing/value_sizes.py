"""Operators whose results have a size that depends on the values of their operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["is_read_as_number", "size_depends_on_values"]

aten = torch.ops.aten
_WITHOUT_TAG = ("torchvision::nms",)  # have such a size, and no tag of torch that says so


def size_depends_on_values(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the size of the result of a call depends on the values of its operands.

    Example:
        >>> x, mask, places = torch.zeros(3), torch.tensor([True, False, True]), torch.tensor([0, 2])
        >>> size_depends_on_values(aten.index.Tensor, (x, [mask]), {})
        True
        >>> size_depends_on_values(aten.index.Tensor, (x, [places]), {})
        False
    """
    if op is aten.index.Tensor:  # has the tag, but the size of integer indices is known
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if op is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return torch.Tag.dynamic_output_shape in op.tags or op._schema.name in _WITHOUT_TAG


def is_read_as_number(op: OpOverload) -> bool:
    """Return whether the result of an operator is a Python number with the value of its operand."""
    return torch.Tag.data_dependent_output in op.tags or op is aten._local_scalar_dense.default
