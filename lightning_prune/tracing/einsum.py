"""Equations of ``torch.einsum`` that contract two tensors, the only ones that the trace follows."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

__all__ = ["contraction_arguments", "parse_contraction"]

_EQUATION = re.compile(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")


def parse_contraction(equation: str) -> tuple[str, str, str] | None:
    """Return the indices of both operands and of the result; None if the equation is not a plain contraction.

    In a plain contraction no index occurs twice in a term, an index of only one operand is in the result, and at
    least one index of both operands is summed over.

    Example:
        >>> parse_contraction("bhqd, bhkd -> bhqk")
        ('bhqd', 'bhkd', 'bhqk')
        >>> [parse_contraction(equation) for equation in ("bc,bc->bc", "bcd,be->be", "ii,ij->ij")]
        [None, None, None]
    """
    match = _EQUATION.fullmatch(equation.replace(" ", ""))
    if match is None:
        return None
    left, right, out = match.groups()
    unique = all(len(set(term)) == len(term) for term in (left, right, out))
    single, common = set(left) ^ set(right), set(left) & set(right)
    return (left, right, out) if unique and single <= set(out) and not common <= set(out) else None


def contraction_arguments(args: tuple[Any, ...]) -> tuple[str, list[Tensor]] | None:
    """Return equation and operands from the arguments of ``torch.einsum``; None if it is no plain contraction.

    None is also returned if the operands do not fit the equation.
    """
    if len(args) < 2 or not isinstance(args[0], str) or (terms := parse_contraction(args[0])) is None:
        return None
    operands = list(args[1] if isinstance(args[1], (list, tuple)) else args[1:])
    if [tensor.dim() for tensor in operands] != [len(terms[0]), len(terms[1])]:
        return None
    left, right = (
        dict(zip(term, tensor.shape, strict=True)) for term, tensor in zip(terms, operands, strict=False)
    )
    fits = all(left[index] == right[index] for index in left.keys() & right)
    return (args[0], operands) if fits else None
