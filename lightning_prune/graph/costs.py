"""Costs of a network as exact functions of the units that remain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix

from lightning_prune.tracing.ids import Units

__all__ = ["Column", "CostModel", "Term", "inverted", "number_columns", "number_equal", "number_rows"]

#: non-zero entries of one column of a matrix, as (row, value), sorted
Column = tuple[tuple[int, int], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Term:
    """One summand of a cost: ``scale * prod(number of remaining channels of each factor)``.

    The MACs of a convolution are one term, ``positions * kernel * kernel * channels_out * channels_in``. Each
    parameter is one term of ``"params"``.

    With a ``function``, the term is ``scale * function(*numbers)``, rounded to a whole number. If one of the numbers
    is 0, the function is not called and the term is 0. It must return the same value on every process.

    Attributes:
        layer: name of the layer or parameter that causes the cost.
        scale: constant factor.
        factors: for each dimension that can shrink, the unit of each of its indices.
        function: of the numbers of remaining channels, in the order of the factors; None: their product.

    Example:
        >>> Term("conv", 9, (np.array([0, 1]), np.array([2, 3, 4]))).cost([2, 3])
        54
        >>> table = {1: 0.5, 2: 0.75}
        >>> Term("conv", 1000, (np.array([0, 1]),), table.__getitem__).cost([2])
        750
    """

    layer: str
    scale: int
    factors: tuple[Units, ...]
    function: Callable[..., float] | None = None

    def cost(self, counts: Sequence[int]) -> int:
        """Return the cost for the given number of remaining channels of each factor."""
        if self.function is None:
            return self.scale * prod(counts)
        return round(self.scale * self.function(*counts)) if all(counts) else 0


class CostModel:
    """A cost as an exact function of the remaining units. Nothing is run or rebuilt.

    Args:
        terms: the summands of the cost.
        num_units: number of units in the graph.

    Attributes:
        terms: the summands.
        scale: the scale of each term, shape (terms,).
        index: the row in ``incidence`` of each factor of each term, shape (terms, factors of the longest term).
        incidence: the number of indices of each distinct factor that belong to each unit, shape (factors, units).
    """

    def __init__(self, terms: Sequence[Term], num_units: int) -> None:
        rows_of: dict[bytes, int] = {}
        factors: list[Units] = []
        width = max((len(term.factors) for term in terms), default=0)
        self.terms = tuple(terms)
        self.scale = np.array([term.scale for term in terms], dtype=np.float64)
        # -1 selects a dummy factor of count 1 (see `from_counts`), so that all terms have the same number of factors.
        self.index = np.full((len(terms), width), -1, dtype=np.int64)
        for row, term in enumerate(terms):
            for column, factor in enumerate(term.factors):
                key = factor.tobytes()  # equal factors share a row
                if key not in rows_of:
                    rows_of[key] = len(factors)
                    factors.append(factor)
                self.index[row, column] = rows_of[key]
        self._function_rows = [row for row, term in enumerate(terms) if term.function is not None]
        self.incidence = _incidence(factors, num_units)

    @cached_property
    def unit_kinds(self) -> tuple[list[int], list[Column]]:
        """A number for each unit, equal for units that occur equally often in every factor; the columns by number."""
        return number_columns(csc_matrix(self.incidence))

    def per_term(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the cost of each term when only the units in the mask ``kept`` remain, shape (terms,)."""
        return self.from_counts(self.incidence @ kept.astype(np.float64))

    def from_counts(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the cost of each term for the number of remaining indices of each factor, shape (factors,)."""
        term_counts = np.append(counts, 1.0)[self.index]
        values = self.scale * term_counts.prod(axis=1)
        for row in self._function_rows:
            term = self.terms[row]
            values[row] = term.cost(term_counts[row, : len(term.factors)].astype(int).tolist())
        return values

    def total(self, kept: NDArray[np.bool_]) -> int:
        """Return the cost of the whole network when only the units in the mask ``kept`` remain."""
        return int(self.per_term(kept).sum())


def _incidence(factors: Sequence[Units], num_units: int) -> csr_matrix:
    rows = np.repeat(np.arange(len(factors)), [len(factor) for factor in factors])
    columns = np.concatenate(factors) if factors else np.empty(0, np.int64)
    return csr_matrix((np.ones(len(columns)), (rows, columns)), shape=(len(factors), num_units))


def number_columns(matrix: csc_matrix) -> tuple[list[int], list[Column]]:
    """Number the columns of a matrix of integers in the order of their first occurrence, equal columns equally.

    Returns:
        The number of each column, and for each number the non-zero entries (row, value) of its columns, by row.

    Example:
        >>> number_columns(csc_matrix([[1, 0, 1], [2, 3, 2]]))
        ([0, 1, 0], [((0, 1), (1, 2)), ((1, 3),)])
    """
    matrix.sort_indices()
    entries = np.stack([matrix.indices, matrix.data], axis=1).astype(np.int64)
    # Units of a layer have neighbouring numbers: only the first of a run of equal columns is looked up.
    is_first = _differs_from_previous(entries, matrix.indptr.astype(np.int64))
    firsts = np.flatnonzero(is_first)
    content, starts = entries.tobytes(), entries.strides[0] * matrix.indptr.astype(np.int64)
    pairs = zip(starts[firsts].tolist(), starts[firsts + 1].tolist(), strict=True)
    numbers, distinct = number_equal(content[start:end] for start, end in pairs)
    columns = [np.frombuffer(column, np.int64).reshape(-1, 2).tolist() for column in distinct]
    of_column = np.array(numbers, dtype=np.int64)[np.cumsum(is_first) - 1]
    return of_column.tolist(), [tuple((row, value) for row, value in column) for column in columns]


def _differs_from_previous(entries: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return, for each column of a sparse matrix, whether it is the first or has other entries than the one before.

    Args:
        entries: row and value of all entries, column by column, shape (entries, 2).
        starts: where the entries of each column start, shape (columns + 1,).
    """
    sizes = np.diff(starts)
    differs = np.ones(len(sizes), dtype=bool)
    differs[1:] = sizes[1:] != sizes[:-1]
    columns = np.repeat(np.arange(len(sizes)), sizes)
    # In columns with as many entries as the one before, each entry has its partner that many places before it.
    comparable = np.flatnonzero(~differs[columns])
    partners = comparable - sizes[columns[comparable]]
    other_row, other_value = (entries[comparable] != entries[partners]).T
    unequal = other_row | other_value
    differs[columns[comparable[unequal]]] = True
    return differs


def number_rows(*columns: Sequence[int]) -> list[int]:
    """Number rows of equal numbers in the order of their first occurrence, equal rows equally.

    Example:
        >>> number_rows([5, 5, 7, 5], [1, 1, 1, 2])
        [0, 0, 1, 2]
    """
    rows = np.array(columns, dtype=np.int64).T
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    numbers, _ = number_equal(map(tuple, rows[is_first].tolist()))
    numbered: list[int] = np.array(numbers, dtype=np.int64)[np.cumsum(is_first) - 1].tolist()
    return numbered


def number_equal(items: Iterable[T]) -> tuple[list[int], list[T]]:
    """Number items in the order of their first occurrence, equal items equally.

    Returns:
        The number of each item, and the distinct items in the order of their numbers.

    Example:
        >>> number_equal("abca")
        ([0, 1, 2, 0], ['a', 'b', 'c'])
    """
    numbers: dict[T, int] = {}
    return [numbers.setdefault(item, len(numbers)) for item in items], list(numbers)


def inverted(values: Mapping[int, Iterable[T]]) -> dict[T, set[int]]:
    """Return the keys of each value.

    Example:
        >>> inverted({1: "ab", 2: "b"})
        {'a': {1}, 'b': {1, 2}}
    """
    keys: dict[T, set[int]] = {}
    for key, items in values.items():
        for item in items:
            keys.setdefault(item, set()).add(key)
    return keys
