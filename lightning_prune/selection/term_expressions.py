"""Costs of a network as linear functions of the variables of an integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.costs import Term
from lightning_prune.selection.integer_program import Choice, Expression, IntegerProgram

__all__ = ["CountFactor", "TermExpressions"]

MOST_LEVELS = 200  # of a sum of widths
MOST_COMBINATIONS = 4000  # of levels in one term
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class CountFactor:
    """Remaining channels along a dimension: ``constant + sum(times * kept units)`` over classes of units.

    Attributes:
        constant: channels that do not depend on a choice.
        times: class -> channels of each of its units.
    """

    constant: int
    times: tuple[tuple[int, int], ...] = ()

    def count(self, kept: Mapping[int, Any]) -> Any:
        """Return the number of channels, or an array of them, for the kept units of each class."""
        return self.constant + sum(times * kept[unit_class] for unit_class, times in self.times)


@dataclass
class TermExpressions:
    """Adds terms to expressions of a program: exactly, unless they depend on too many combinations of levels.

    Args:
        program: that has the choices.
        levels: class of units -> the choice of how many of its units stay.
        reference: class of units -> kept units at which other terms are linearised.

    Attributes:
        is_exact: whether no term was linearised.
    """

    program: IntegerProgram
    levels: Mapping[int, Choice]
    reference: Mapping[int, int]
    is_exact: bool = True

    def add(self, expression: Expression, term: Term, factors: Sequence[CountFactor]) -> None:
        """Add a term whose factors are these.

        Products of two sums, as of the channels that a concatenation joins, become a sum of products of two classes.
        Other terms over several classes are tabulated over all combinations of levels. If there are too many of
        them, the effect of each class but one is added up, as if it changed alone.
        """
        classes = list(dict.fromkeys(unit_class for factor in factors for unit_class, _ in factor.times))
        if not classes:
            expression.constant += term.cost([factor.constant for factor in factors])
        elif term.function is None and len(factors) <= 2 and len(classes) > len(factors):
            self._add_product(expression, term.scale, [*factors, CountFactor(1)][:2])
        elif (axes := self._axes(factors)) is not None:
            self._add_table(expression, term, *axes)
        else:
            self._add_linearised(expression, term, factors, classes)

    def _add_product(self, expression: Expression, scale: int, factors: Sequence[CountFactor]) -> None:
        """Add ``scale * (a + sum(b * x)) * (c + sum(d * y))``, multiplied out."""
        first, second = factors
        expression.constant += scale * first.constant * second.constant
        for one, other in ((first, second), (second, first)):
            for unit_class, times in one.times:
                choice = self.levels[unit_class]
                expression.add(choice.variables, scale * other.constant * times * choice.counts)
        for (a, times_a), (b, times_b) in product(first.times, second.times):
            left, right, times = self.levels[a], self.levels[b], scale * times_a * times_b
            if a == b:
                expression.add(left.variables, times * left.counts**2)
            else:
                expression.add(self.program.pair(left, right), times * np.outer(left.counts, right.counts))

    def _axes(
        self, factors: Sequence[CountFactor]
    ) -> tuple[list[Choice], list[tuple[Choice | None, Counts]]] | None:
        """Return the distinct choices of a term, and for each factor its choice with its count for each level.

        None if the levels have too many combinations.
        """
        sides: list[tuple[Choice | None, Counts]] = []
        for factor in factors:
            if not factor.times:
                sides.append((None, np.array([factor.constant])))
                continue
            side = self._side(factor)
            if side is None:
                return None
            sides.append(side)
        distinct = list({id(choice): choice for choice, _ in sides if choice is not None}.values())
        return (distinct, sides) if prod(map(len, distinct)) <= MOST_COMBINATIONS else None

    def _side(self, factor: CountFactor) -> tuple[Choice, Counts] | None:
        """Return the choice that a factor depends on, and its count for each level; None with too many levels."""
        (first, times), *others = factor.times
        choice = self.levels[first]
        for unit_class, other_times in others:
            other = self.levels[unit_class]
            sums = np.unique(times * choice.counts[:, None] + other_times * other.counts)
            if len(sums) > MOST_LEVELS:
                return None
            choice, times = self.program.total(choice, other, (times, other_times)), 1
        return choice, factor.constant + times * choice.counts

    def _add_table(
        self,
        expression: Expression,
        term: Term,
        choices: list[Choice],
        sides: list[tuple[Choice | None, Counts]],
    ) -> None:
        """Add a term as a table over all combinations of levels of its choices."""
        shape = tuple(map(len, choices))
        counts = [
            values.reshape([-1 if choice is other else 1 for other in choices]) for choice, values in sides
        ]
        expression.add(self._combinations(choices).reshape(shape), _values(term, counts, shape))

    def _combinations(self, choices: Sequence[Choice]) -> Counts:
        """Return the variable of each combination of levels."""
        first, *others = choices
        variables = first.variables
        for other in others:
            joint = first if variables is first.variables else self.program.joint(variables)
            variables = self.program.pair(joint, other).ravel()
        return variables

    def _add_linearised(
        self, expression: Expression, term: Term, factors: Sequence[CountFactor], classes: Sequence[int]
    ) -> None:
        """Add the effect of each class but one, the anchor, as if the others were at the reference."""
        self.is_exact = False
        single = [factor.times[0][0] for factor in factors if len(factor.times) == 1]
        anchor = max(single or classes, key=lambda c: len(self.levels[c]))
        along_anchor = {**self.reference, anchor: self.levels[anchor].counts[:, None]}
        base = _values(term, [f.count(along_anchor) for f in factors], (len(self.levels[anchor]), 1))
        expression.add(self.levels[anchor].variables, base[:, 0])
        for other in classes:
            if other != anchor:
                kept = {**along_anchor, other: self.levels[other].counts}
                shape = (len(self.levels[anchor]), len(self.levels[other]))
                change = _values(term, [f.count(kept) for f in factors], shape) - base
                expression.add(self.program.pair(self.levels[anchor], self.levels[other]), change)


def _values(term: Term, counts: Sequence[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the cost of a term for arrays of counts that broadcast to ``shape``."""
    arrays = [np.broadcast_to(np.asarray(count), shape) for count in counts]
    if term.function is None:
        return np.prod([array.astype(np.float64) for array in arrays], axis=0, initial=float(term.scale))
    rows = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    return np.array([term.cost(row) for row in rows], dtype=np.float64).reshape(shape)
