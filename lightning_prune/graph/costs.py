"""NEW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from lightning_prune.tracing.ids import Units


@dataclass(frozen=True)
class Term:
    """One part of a resource: ``scale * prod(number of channels kept in each factor)``, or any function of these.

    A convolution has one term in MACs, ``positions * kernel * kept_out * kept_in``; every parameter has one
    in params. ``factors`` holds, for each dimension that can shrink, the unit of each of its indices.

    With a ``function`` of these numbers, in the order of the factors, the term is ``scale * function(*numbers)``,
    rounded to a whole number. It is not called where nothing is left, which costs nothing. It must always give
    the same, on every process.

    Example:
        >>> table = {1: 0.5, 2: 0.75}
        >>> Term("conv", 1000, (np.array([0, 1]),), table.__getitem__).cost([2])
        750
    """

    layer: str
    scale: int
    factors: tuple[Units, ...]
    function: Callable[..., float] | None = None

    def cost(self, counts: Sequence[int]) -> int:
        """What it costs where so many channels stay in each factor."""
        if self.function is None:
            return self.scale * prod(counts)
        return round(self.scale * self.function(*counts)) if all(counts) else 0


class CostModel:
    """A resource as an exact function of the units that stay. Nothing is run or rebuilt.

    Args:
        terms: what sums up to the resource.
        num_units: number of units in the graph.
    """

    def __init__(self, terms: Sequence[Term], num_units: int) -> None:
        factors: dict[bytes, int] = {}
        arrays: list[Units] = []
        width = max((len(term.factors) for term in terms), default=0)
        self.terms = tuple(terms)
        self.scale = np.array([term.scale for term in terms], dtype=np.float64)
        # Column `len(arrays)` is a dummy factor of count 1, so that all terms have the same number of factors.
        self.index = np.full((len(terms), width), -1, dtype=np.int64)
        for row, term in enumerate(terms):
            for column, factor in enumerate(term.factors):
                key = factor.tobytes()
                if key not in factors:
                    factors[key] = len(arrays)
                    arrays.append(factor)
                self.index[row, column] = factors[key]
        rows = np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
        columns = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        ones = np.ones(len(columns))
        self._curved = [row for row, term in enumerate(terms) if term.function is not None]
        #: how many indices of each factor belong to each unit, shape (factors, units)
        self.incidence = csr_matrix((ones, (rows, columns)), shape=(len(arrays), num_units))

    def per_term(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Cost of each term when only the units in the mask ``kept`` stay."""
        return self.from_counts(self.incidence @ kept.astype(np.float64))

    def from_counts(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cost of each term, given how many indices of each factor stay, shape (factors,)."""
        each = np.append(counts, 1.0)[self.index]
        values = self.scale * each.prod(axis=1)
        for row in self._curved:
            term = self.terms[row]
            values[row] = term.cost(each[row, : len(term.factors)].astype(int).tolist())
        return values

    def total(self, kept: NDArray[np.bool_]) -> int:
        """Cost of the whole network when only the units in the mask ``kept`` stay."""
        return int(self.per_term(kept).sum())
