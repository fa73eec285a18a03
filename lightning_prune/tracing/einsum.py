"""What ``torch.einsum`` is asked to do, where it contracts two tensors and no more (level 0)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

__all__ = ["letters", "two_tensors"]

_EQUATION = re.compile(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")


def letters(equation: str) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result of a contraction; None for anything else.

    Example:
        >>> letters("bhqd, bhkd -> bhqk")
        ('bhqd', 'bhkd', 'bhqk')
        >>> letters("bc,bc->bc") is letters("bcd,be->be") is letters("ii,ij->ij") is None
        True
    """
    found = _EQUATION.fullmatch(equation.replace(" ", ""))
    if found is None:
        return None
    left, right, out = found.groups()
    once = all(len(set(each)) == len(each) for each in found.groups())
    alone, both = set(left) ^ set(right), set(left) & set(right)
    return (left, right, out) if once and alone <= set(out) and not both <= set(out) else None


def two_tensors(args: tuple[Any, ...]) -> tuple[str, list[Tensor]] | None:
    """Equation and operands as they were passed to ``torch.einsum``, if it contracts two tensors that fit."""
    if len(args) < 2 or not isinstance(args[0], str) or (found := letters(args[0])) is None:
        return None
    operands = list(args[1] if isinstance(args[1], (list, tuple)) else args[1:])
    if [tensor.dim() for tensor in operands] != [len(found[0]), len(found[1])]:
        return None
    left, right = (
        dict(zip(each, tensor.shape, strict=True)) for each, tensor in zip(found, operands, strict=False)
    )
    return (
        (args[0], operands) if all(left[letter] == right[letter] for letter in left.keys() & right) else None
    )
