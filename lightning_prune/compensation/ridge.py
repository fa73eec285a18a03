"""Ridge regression with several dampings and right-hand sides, in the smaller of its two forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["RidgeSystem", "ridge"]


def ridge(x: Tensor, residual: Tensor, dampings: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Yield each damping with the matrix V that minimises ``|x V - residual|^2 + damping * scale * |V|^2``.

    ``scale`` is the mean of the diagonal of ``x.T @ x``. Dampings with which the system is singular are left out.

    Args:
        x: (groups, positions, inputs).
        residual: (groups, positions, filters).
        dampings: in the order in which the solutions are wanted.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0]]])
        >>> [(damping, solution.item()) for damping, solution in ridge(x, 3 * x, [0.0, 0.5])]
        [(0.0, 3.0), (0.5, 2.0)]
    """
    system = RidgeSystem(x)
    for damping in dampings:
        solve = system.solver(damping) if residual.isfinite().all() else None
        if solve is not None:
            yield damping, solve(residual)


class RidgeSystem:
    """The left side of a ridge regression; with fewer positions than inputs, that of the positions.

    Args:
        x: (groups, positions, inputs).

    Example:
        >>> solve = RidgeSystem(torch.tensor([[[1.0], [2.0]]])).solver(0.5)
        >>> solve(torch.tensor([[[3.0], [6.0]]]))
        tensor([[[2.]]])
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.is_dual = x.shape[1] < x.shape[2]
        self.gram = (x @ x.mT if self.is_dual else x.mT @ x).double()
        self.scale = self.gram.diagonal(dim1=1, dim2=2).sum(1) / x.shape[2]

    def solver(self, damping: float) -> Callable[[Tensor], Tensor] | None:
        """Return a function from a residual to the solution; None if the system is singular or not finite."""
        if not self.gram.isfinite().all():
            return None
        system = self.gram.clone()
        # Groups whose inputs are all zero get the identity: their solution is zero.
        shift = torch.where(self.scale > 0, damping * self.scale, 1)
        system.diagonal(dim1=1, dim2=2).add_(shift[:, None])
        factor, info = torch.linalg.cholesky_ex(system)
        return None if info.any() else lambda residual: self._solution(factor, residual)

    def _solution(self, factor: Tensor, residual: Tensor) -> Tensor:
        right = residual if self.is_dual else self.x.mT @ residual
        solution = torch.cholesky_solve(right.double(), factor).to(self.x.dtype)
        return self.x.mT @ solution if self.is_dual else solution
