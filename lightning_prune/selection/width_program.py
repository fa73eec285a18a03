"""The integer program of a network: how many units of each class stay, under budgets and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.selection.integer_program import Expression, IntegerProgram
from lightning_prune.selection.term_expressions import CountFactor, TermExpressions
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.tracing.ids import Units

__all__ = ["WidthChoice", "WidthProgram"]


@dataclass(frozen=True)
class WidthChoice:
    """One class of interchangeable units, of which the least important go first.

    Attributes:
        unit_class: its number in the pool.
        units: those that may be removed, the least important first.
        size: number of all units of the class, also of those that must stay.
        removed: numbers of removed units to choose from, ascending.
        losses: importance of the first n units together, for n from 0 on, shape (len(units) + 1,).
    """

    unit_class: int
    units: Sequence[int]
    size: int
    removed: Sequence[int]
    losses: NDArray[np.float64]

    @property
    def kept(self) -> list[int]:
        """Number of units that stay, for each entry of ``removed``."""
        return [self.size - number for number in self.removed]


class WidthProgram:
    """An :class:`IntegerProgram` with one choice for each class of units.

    Args:
        graph: of the network.
        pool: of its units, none of which is taken.
        choices: the classes that may be cut, each with at least two widths to choose from.
        reference: kept units of each class, at which terms of too many classes are linearised.

    Attributes:
        program: the integer program.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        pool: UnitPool,
        choices: Sequence[WidthChoice],
        reference: Mapping[int, int],
    ) -> None:
        self.program = IntegerProgram()
        self._graph, self._pool = graph, pool
        self._levels = {
            choice.unit_class: self.program.choice(choice.kept, choice.losses[list(choice.removed)])
            for choice in choices
        }
        self._all = frozenset(self._levels)
        self._terms = TermExpressions(self.program, self._levels, reference)
        self._factors: dict[tuple[frozenset[int], bytes], CountFactor] = {}

    @property
    def is_exact(self) -> bool:
        """Whether no term was linearised."""
        return self._terms.is_exact

    def cost(self, terms: Iterable[Term], classes: Iterable[int] | None = None) -> Expression:
        """Return the sum of terms while all units but those of ``classes`` stay; None: of all choices."""
        variable = self._all if classes is None else self._all.intersection(classes)
        expression = Expression()
        for term in terms:
            self._terms.add(expression, term, [self._factor(units, variable) for units in term.factors])
        return expression

    def add_minima(self) -> None:
        """Require what several classes together must keep; what each class alone must keep is in its choice."""
        layers = [Term(name, 1, (units,)) for name, units in self._graph.layers.items()]
        owners = self._graph.layer_tree.owners
        for quantity, name, minimum, classes in self._pool.minima():
            if minimum <= 0 or len(self._all & classes) < 2:
                continue
            terms = self._graph.terms["params"] if quantity == "params" else layers
            if quantity == "floor":
                owned = [term for term in terms if module_of(term.layer) == name]
            else:
                owned = [term for term in terms if name in owners(term.layer)]
            self.program.at_least(self.cost(owned, classes), minimum)
        for units in self._dimensions_to_keep():
            self.program.at_least(self.cost([Term("", 1, (units,))]), 1)

    def _dimensions_to_keep(self) -> Iterable[Units]:
        """Yield the dimensions that must keep a channel, but that several classes together could empty."""
        dimensions = {
            units.tobytes(): units
            for terms in self._graph.terms.values()
            for term in terms
            for units in term.factors
        }
        for units in dimensions.values():
            factor = self._factor(units, self._all)
            fewest = factor.count({c: int(self._levels[c].counts.min()) for c, _ in factor.times})
            if len(factor.times) > 1 and fewest < 1 and not self._graph.may_empty(units):
                yield units

    def _factor(self, units: Units, classes: frozenset[int]) -> CountFactor:
        """Return the remaining channels of a dimension, of which only ``classes`` are variable."""
        key = classes, units.tobytes()
        if key not in self._factors:
            numbers, counts = np.unique(self._class_of[units], return_counts=True)
            # Each unit of a class occurs equally often along the dimension.
            times = tuple(
                (c, n // int(self._sizes[c]))
                for c, n in zip(numbers.tolist(), counts.tolist(), strict=True)
                if c in classes
            )
            variable = sum(n * int(self._sizes[c]) for c, n in times)
            self._factors[key] = CountFactor(len(units) - variable, times)
        return self._factors[key]

    @cached_property
    def _class_of(self) -> NDArray[np.int64]:
        return np.array(self._pool.classes, dtype=np.int64)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.bincount(self._class_of)
