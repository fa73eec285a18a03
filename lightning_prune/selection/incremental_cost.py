"""Exact costs, updated one unit at a time during selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import CostModel, Term, number_columns, number_rows

__all__ = ["IncrementalCost", "unit_classes"]

Numbers = tuple[int, ...]


class IncrementalCost:
    """Cost of a network in one resource, updated while units are removed and restored.

    It gives the same totals as :class:`CostModel`, but removing a unit recomputes only the terms in which the unit
    occurs. Everything is integer arithmetic, so it is exact.

    Args:
        model: the resource.
        accounts: name of a term's layer -> indices of the accounts to which its cost is added too.
        number: how many accounts there are.

    Attributes:
        total: cost of the network now.
        counts: for each factor of the model, how many of its indices are left.
        accounts: for each account, the cost of its terms now.
        may_empty: factors that may lose their last index.
        kinds: for each unit a number, equal for units that occur equally often in every factor.

    Example:
        >>> term = Term("conv", 9, (np.array([0, 1]), np.array([2, 3, 4])))
        >>> cost = IncrementalCost(CostModel([term], 5))
        >>> before = cost.total
        >>> cost.shift(0, -1)
        >>> cost.shift(4, -1)
        >>> before, cost.total
        (54, 18)
    """

    def __init__(
        self, model: CostModel, accounts: Callable[[str], Sequence[int]] = lambda layer: (), number: int = 0
    ) -> None:
        layer_accounts = {layer: tuple(accounts(layer)) for layer in {term.layer for term in model.terms}}
        # CostModel fills rows of its index with -1 up to the length of the longest term.
        factors = [tuple(factor for factor in row if factor >= 0) for row in model.index.tolist()]
        merged = merge_terms(model.terms, factors, [layer_accounts[term.layer] for term in model.terms])
        self._terms = [(term, term_factors) for term, term_factors, _ in merged]
        self._term_accounts = [term_accounts for _, _, term_accounts in merged]
        self.counts: list[int] = model.incidence.sum(axis=1).A1.astype(int).tolist() if merged else []
        self._values = [self._term_value(term) for term in range(len(merged))]
        self.total = sum(self._values)
        self.accounts = [0] * number
        self.may_empty: frozenset[int] = frozenset()
        for value, term_accounts in zip(self._values, self._term_accounts, strict=True):
            for account in term_accounts:
                self.accounts[account] += value
        self._index_units(model)

    def shift(self, unit: int, number: int) -> None:
        """Add ``number`` units that occur as often as ``unit`` in every factor; a negative number removes them."""
        for factor, count in self._unit_factors[unit]:
            self.counts[factor] += number * count
        for term in self._unit_terms[unit]:
            value = self._term_value(term)
            change = value - self._values[term]
            self._values[term] = value
            self.total += change
            for account in self._term_accounts[term]:
                self.accounts[account] += change

    @property
    def only_falls(self) -> bool:
        """Whether the total cannot rise when units are removed: it is a sum of products, not of other functions."""
        return all(term.function is None and term.scale >= 0 for term, _ in self._terms)

    def is_emptied(self, unit: int) -> bool:
        """Return whether a factor in which ``unit`` occurs has no index left although it must keep one."""
        return any(
            self.counts[factor] < 1 and factor not in self.may_empty for factor, _ in self._unit_factors[unit]
        )

    def accounts_of(self, unit: int) -> set[int]:
        """Return the accounts whose cost depends on ``unit``."""
        return {account for term in self._unit_terms[unit] for account in self._term_accounts[term]}

    def _index_units(self, model: CostModel) -> None:
        """Store the factors and terms of each unit."""
        terms_of_factor: list[list[int]] = [[] for _ in self.counts]
        for term, (_, factors) in enumerate(self._terms):
            for factor in set(factors):
                terms_of_factor[factor].append(term)
        # Units with equal columns share one tuple. That is faster, too: it stays in the processor's cache.
        self.kinds, distinct = model.unit_kinds
        terms = [
            tuple(sorted({term for factor, _ in column for term in terms_of_factor[factor]}))
            for column in distinct
        ]
        self._unit_factors = [distinct[kind] for kind in self.kinds]
        self._unit_terms = [terms[kind] for kind in self.kinds]

    def _term_value(self, number: int) -> int:
        term, factors = self._terms[number]
        counts = self.counts
        if term.function is not None:
            return term.cost([counts[factor] for factor in factors])
        value = term.scale  # written out, because a selection computes hundreds of thousands of products
        for factor in factors:
            value *= counts[factor]
        return value


def merge_terms(
    terms: Sequence[Term], factors: Sequence[Numbers], accounts: Sequence[Numbers]
) -> list[tuple[Term, Numbers, Numbers]]:
    """Add up terms that are products of the same factors and belong to the same accounts.

    Terms with a function are left unchanged.

    Returns:
        For each resulting term: the term, its factors and its accounts.
    """
    scales: dict[tuple[Numbers, Numbers], int] = {}
    others = []
    for term, term_factors, term_accounts in zip(terms, factors, accounts, strict=True):
        if term.function is not None:
            others.append((term, term_factors, term_accounts))
        else:
            key = term_factors, term_accounts
            scales[key] = scales.get(key, 0) + term.scale
    return [(Term("", scale, ()), *key) for key, scale in scales.items()] + others


def layer_incidence(graph: ChannelGraph) -> csc_matrix:
    """Return how many filters of each layer belong to each unit, shape (layers, units)."""
    sizes = [len(units) for units in graph.layers.values()]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    units = np.concatenate([*graph.layers.values(), np.empty(0, np.int64)])
    shape = (len(sizes), graph.num_units)
    return csc_matrix(csr_matrix((np.ones(len(units)), (rows, units)), shape=shape))


def unit_classes(graph: ChannelGraph) -> list[int]:
    """Return a class number for each unit, equal for units that occur equally often in every dimension.

    Such units are interchangeable for every cost and limit: if one of them may not be removed, none of them may.
    Classes are numbered in the order of their first units.

    Example:
        >>> terms = [Term("a.weight", 1, (np.array([0, 1, 2]),)), Term("b.weight", 1, (np.array([1, 1, 3]),))]
        >>> unit_classes(ChannelGraph(4, {}, {"a.weight": np.arange(3)}, {}, {}, {"params": terms}))
        [0, 1, 0, 2]
    """
    kinds = [
        number_columns(layer_incidence(graph))[0],
        *(m.unit_kinds[0] for m in graph.cost_models.values()),
    ]
    return number_rows(*kinds)
