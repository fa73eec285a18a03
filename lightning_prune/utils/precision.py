"""Precision of products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["exact_products"]


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, also where the process allows TF32 or bfloat16.

    A Gram matrix of inputs with 10 bits is far from the one of the inputs: regressions become noise or fail.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with exact_products():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'medium'
        >>> torch.set_float32_matmul_precision("highest")
    """
    backends = _backends()
    precisions = [backend.fp32_precision for backend in backends]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the process has set fp32_precision of a backend, after which torch refuses to tell
        precision = None
        for backend in backends:
            backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, before in zip(backends, precisions, strict=True):
            backend.fp32_precision = before


def _backends() -> list[Any]:
    """Return the back ends that have a precision of their own, from torch 2.9 on."""
    matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
