"""Costs kept up to date while units go one by one, in plain integers (level 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import CostModel, Term

__all__ = ["IncrementalCost", "unit_classes"]

#: what one unit takes from each factor, as (factor, number of indices)
Uses = tuple[tuple[int, int], ...]
Numbers = tuple[int, ...]


class IncrementalCost:
    """One resource of a network, updated unit by unit; :class:`CostModel` for when order matters.

    Removing a unit recomputes only the terms in which it occurs. Exact: integers throughout.

    Args:
        model: the resource.
        accounts: name of a term's layer -> numbers of the accounts that its cost is also booked to.
        number: how many accounts there are.

    Example:
        >>> from lightning_prune.graph.channel_graph import Term
        >>> term = Term("conv", 9, (np.array([0, 1]), np.array([2, 3, 4])))
        >>> ledger = Ledger(CostModel([term], 5))
        >>> before = ledger.total
        >>> ledger.remove([0, 4])
        >>> before, ledger.total
        (54, 18)
    """

    def __init__(
        self, model: CostModel, accounts: Callable[[str], Sequence[int]] = lambda layer: (), number: int = 0
    ) -> None:
        booked = {layer: tuple(accounts(layer)) for layer in {term.layer for term in model.terms}}
        rows = [tuple(factor for factor in row if factor >= 0) for row in model.index.tolist()]
        merged = merge(model.terms, rows, [booked[term.layer] for term in model.terms])
        self._terms = [(term, factors) for term, factors, _ in merged]
        self._booked = [numbers for _, _, numbers in merged]
        self.counts: list[int] = model.incidence.sum(axis=1).A1.astype(int).tolist() if merged else []
        self._values = [self._value(number) for number in range(len(merged))]
        self.total = sum(self._values)
        self.accounts = [0] * number
        self.may_empty: frozenset[int] = frozenset()  # factors
        for value, numbers in zip(self._values, self._booked, strict=True):
            for account in numbers:
                self.accounts[account] += value
        self._index(csc_matrix(model.incidence))

    def remove(self, units: Iterable[int]) -> None:
        """Take units out."""
        for unit in units:
            self._shift(unit, -1)

    def restore(self, units: Iterable[int]) -> None:
        """Put units back."""
        for unit in units:
            self._shift(unit, 1)

    def empties(self, unit: int) -> bool:
        """Whether some dimension that ``unit`` occurs in has nothing left, and must not."""
        return any(self.counts[factor] < 1 and factor not in self.may_empty for factor, _ in self._uses[unit])

    def booked(self, unit: int) -> set[int]:
        """The accounts that ``unit`` has a part in."""
        return {account for number in self._touched[unit] for account in self._booked[number]}

    def _index(self, incidence: csc_matrix) -> None:
        """For each unit its factors and terms; equal for most units, so they share one tuple."""
        of_factor: list[list[int]] = [[] for _ in self.counts]
        for number, (_, factors) in enumerate(self._terms):
            for factor in set(factors):
                of_factor[factor].append(number)
        kinds, first = alike(incidence)
        uses = [entries(incidence, unit) for unit in first]
        touched = [
            tuple(sorted({number for factor, _ in each for number in of_factor[factor]})) for each in uses
        ]
        self._uses: list[Uses] = [uses[kind] for kind in kinds]
        self._touched: list[tuple[int, ...]] = [touched[kind] for kind in kinds]

    def _value(self, number: int) -> int:
        term, factors = self._terms[number]
        return term.cost([self.counts[factor] for factor in factors])

    def _shift(self, unit: int, sign: int) -> None:
        for factor, number in self._uses[unit]:
            self.counts[factor] += sign * number
        for number in self._touched[unit]:
            value = self._value(number)
            change = value - self._values[number]
            self._values[number] = value
            self.total += change
            for account in self._booked[number]:
                self.accounts[account] += change


def merge(
    terms: Sequence[Term], factors: Sequence[Numbers], booked: Sequence[Numbers]
) -> list[tuple[Term, Numbers, Numbers]]:
    """Products of the same factors that are booked to the same accounts, as one; functions stay as they are."""
    products: dict[tuple[Numbers, Numbers], int] = {}
    others = []
    for term, each, accounts in zip(terms, factors, booked, strict=True):
        if term.function is not None:
            others.append((term, each, accounts))
        else:
            products[each, accounts] = products.get((each, accounts), 0) + term.scale
    return [(Term("", scale, ()), *key) for key, scale in products.items()] + others


def alike(*tables: csc_matrix) -> tuple[list[int], list[int]]:
    """A number for each column, equal for columns that are equal in every table, and the first column of each number.

    Each row gets a random number of 64 bits; columns are compared by the weighted sums of their values.
    """
    random = np.random.default_rng(0)
    sums = np.zeros(tables[0].shape[1], np.uint64)
    for table in tables:
        weights = random.integers(0, 2**64, size=table.shape[0], dtype=np.uint64)
        sums += table.T.astype(np.uint64) @ weights
    _, first, kinds = np.unique(sums, return_index=True, return_inverse=True)
    return kinds.tolist(), first.tolist()


def entries(matrix: csc_matrix, column: int) -> Uses:
    """The rows of one column, each with its value."""
    held = slice(matrix.indptr[column], matrix.indptr[column + 1])
    rows, values = matrix.indices[held].tolist(), matrix.data[held].astype(int).tolist()
    return tuple(sorted(zip(rows, values, strict=True)))


def layer_incidence(graph: ChannelGraph) -> csc_matrix:
    """How many filters of each layer belong to each unit, shape (layers, units)."""
    sizes = [len(units) for units in graph.layers.values()]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    units = np.concatenate([*graph.layers.values(), np.empty(0, np.int64)])
    shape = (len(sizes), graph.num_units)
    return csc_matrix(csr_matrix((np.ones(len(units)), (rows, units)), shape=shape))


def unit_classes(graph: ChannelGraph) -> list[int]:
    """A number for each unit, equal for units that take part in the same dimensions equally often.

    Such units are interchangeable for every cost and limit: what one may not do, the others may not either.
    """
    tables = [layer_incidence(graph), *(csc_matrix(m.incidence) for m in graph.cost_models.values())]
    return alike(*tables)[0]
