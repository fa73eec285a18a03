"""Ridge regression with several dampings, in the smaller of its two forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["ridge"]


def ridge(x: Tensor, residual: Tensor, dampings: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Yield each damping with the matrix V that minimises ``|x V - residual|^2 + damping * scale * |V|^2``.

    ``scale`` is the mean of the diagonal of ``x.T @ x``. With fewer positions than inputs, the system of the
    positions is solved instead of that of the inputs. Dampings with which the system is singular are left out.

    Args:
        x: (groups, positions, inputs).
        residual: (groups, positions, filters).
        dampings: in the order in which the solutions are wanted.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0]]])
        >>> [(damping, solution.item()) for damping, solution in ridge(x, 3 * x, [0.0, 0.5])]
        [(0.0, 3.0), (0.5, 2.0)]
    """
    dual = x.shape[1] < x.shape[2]
    gram = (x @ x.mT if dual else x.mT @ x).double()
    right = (residual if dual else x.mT @ residual).double()
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) / x.shape[2]
    if not (gram.isfinite().all() and right.isfinite().all()):
        return
    for damping in dampings:
        system = gram.clone()
        # Groups whose inputs are all zero get the identity: their solution is zero.
        shift = torch.where(scale > 0, damping * scale, 1)
        system.diagonal(dim1=1, dim2=2).add_(shift[:, None])
        factor, info = torch.linalg.cholesky_ex(system)
        if info.any():
            continue
        solution = torch.cholesky_solve(right, factor).to(x.dtype)
        yield damping, (x.mT @ solution if dual else solution)
