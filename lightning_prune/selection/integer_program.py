"""Integer programs over choices: one level of each choice, under linear and pairwise costs, solved by HiGHS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

__all__ = ["Choice", "Expression", "IntegerProgram", "Solution"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
# HiGHS allows violations of rows, and absolute gaps, of 1e-6: with numbers of these sizes both are negligible.
ROW_SIZE, LOSS_SIZE = 1e5, 1e3
INFEASIBLE, TIME = 2, 1  # status of scipy's milp


@dataclass(eq=False)
class Choice:
    """A number that takes one of several levels.

    Attributes:
        counts: value of each level, shape (levels,).
        variables: number of each level's variable, which is 1 if the level is chosen, shape (levels,).
    """

    counts: Indices
    variables: Indices

    def __len__(self) -> int:
        return len(self.counts)


@dataclass
class Expression:
    """A linear function of the variables of a program, in parts that are added up."""

    constant: float = 0.0
    variables: list[Indices] = field(default_factory=list)
    factors: list[Floats] = field(default_factory=list)

    def add(self, variables: Indices, factors: ArrayLike) -> None:
        """Add variables times factors, both of one shape, or one factor for all."""
        self.variables.append(variables.ravel())
        self.factors.append(np.broadcast_to(np.asarray(factors, dtype=np.float64), variables.shape).ravel())

    def row(self) -> tuple[Indices, Floats]:
        """Return each variable once, and its factor."""
        if not self.variables:
            return np.empty(0, np.int64), np.empty(0)
        variables, place = np.unique(np.concatenate(self.variables), return_inverse=True)
        factors = np.bincount(place, np.concatenate(self.factors), len(variables))
        return variables, factors.astype(np.float64)


@dataclass(frozen=True)
class Solution:
    """Result of a program.

    Attributes:
        levels: index of the chosen level of each choice that has losses; None without a solution.
        value: sum of the losses; infinite without a solution.
        bound: no solution has a smaller value.
        status: ``"optimal"`` within the gap that was asked for; ``"time"``: the time ran out before;
            ``"infeasible"``: there is no solution.
    """

    levels: list[int] | None
    value: float
    bound: float
    status: str


class IntegerProgram:
    """Choose a level of each choice, so that the sum of losses is least and all constraints hold.

    Costs that depend on two choices at once are exact: each pair of levels has a variable between 0 and 1, and those
    of one level sum up to the variable of that level. With whole levels, so are the pairs. (Source: the
    linearisation of Sun et al., 'MDP: Multidimensional Vision Model Pruning with Latency Constraint', CVPR 2025, for
    two widths; its relaxation is that of a transport problem, and tight.)

    Example:
        >>> program = IntegerProgram()
        >>> a = program.choice([1, 2, 4], losses=[3.0, 2.0, 0.0])
        >>> b = program.choice([2, 4], losses=[2.5, 0.0])
        >>> area = Expression()
        >>> area.add(program.pair(a, b), np.outer(a.counts, b.counts))
        >>> program.at_most(area, 8)
        >>> solution = program.solve()  # 2 x 4; 4 x 2 would lose 2.5
        >>> solution.levels, round(solution.value, 6)
        ([1, 1], 2.0)
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._is_binary: list[bool] = []
        self._upper: list[float] = []
        self._rows: list[tuple[Indices, Floats]] = []
        self._row_bounds: list[tuple[float, float]] = []
        self._choices: list[Choice] = []
        # Keys are identities: the choices are stored too, so that they live as long as the program.
        self._pairs: dict[tuple[int, int], Indices] = {}
        self._totals: dict[tuple[int, int, int, int], Choice] = {}
        self._joints: dict[bytes, Choice] = {}
        self._alive: list[Choice] = []

    @property
    def num_variables(self) -> int:
        """How many variables there are."""
        return len(self._losses)

    def choice(self, counts: Sequence[int] | Indices, losses: Sequence[float] | Floats) -> Choice:
        """Add a number with these levels, and the loss of each."""
        choice = self._add_choice(
            np.asarray(counts, dtype=np.int64), np.asarray(losses, dtype=np.float64), True
        )
        self._choices.append(choice)
        self._equal([(choice.variables, 1.0)], 1.0)
        return choice

    def pair(self, first: Choice, second: Choice) -> Indices:
        """Return the variable of each pair of levels, shape (levels of first, levels of second)."""
        key = (id(first), id(second))
        if key[::-1] in self._pairs:
            return self._pairs[key[::-1]].T
        if key not in self._pairs:
            shape = (len(first), len(second))
            pairs = self._add_variables(np.zeros(math.prod(shape)), False).reshape(shape)
            self._pairs[key] = pairs
            for level, variable in enumerate(first.variables):
                self._equal([(pairs[level], 1.0), (variable, -1.0)], 0.0)
            for level, variable in enumerate(second.variables):
                self._equal([(pairs[:, level], 1.0), (variable, -1.0)], 0.0)
        return self._pairs[key]

    def joint(self, variables: Indices) -> Choice:
        """Return a number whose levels are the pairs of levels of two others, from :meth:`pair`, flattened."""
        key = variables.tobytes()
        if key not in self._joints:
            self._joints[key] = Choice(np.arange(len(variables)), variables)
        return self._joints[key]

    def total(self, first: Choice, second: Choice, times: tuple[int, int] = (1, 1)) -> Choice:
        """Return the sum of two numbers, each times a whole number, with one level for each possible sum."""
        key = (id(first), id(second), *times)
        if key not in self._totals:
            sums = times[0] * first.counts[:, None] + times[1] * second.counts
            counts, place = np.unique(sums, return_inverse=True)
            pairs, total = self.pair(first, second), self._add_choice(counts, np.zeros(len(counts)), False)
            for level, variable in enumerate(total.variables):
                self._equal([(pairs[place.reshape(sums.shape) == level], 1.0), (variable, -1.0)], 0.0)
            self._totals[key] = total
        return self._totals[key]

    def at_most(self, expression: Expression, limit: float) -> None:
        """Require that an expression is at most ``limit``."""
        self._bounded(expression, -math.inf, limit)

    def at_least(self, expression: Expression, limit: float) -> None:
        """Require that an expression is at least ``limit``."""
        self._bounded(expression, limit, math.inf)

    def multiple_of(self, expression: Expression, number: int, largest: int) -> None:
        """Require that an expression is a multiple of ``number``, and at most ``largest``."""
        quotient = self._add_variables(np.zeros(1), True, largest // number)
        whole = Expression(expression.constant, [*expression.variables], [*expression.factors])
        whole.add(quotient, -float(number))
        self._bounded(whole, 0.0, 0.0)

    def minimise_ratio(self, expressions: Sequence[Expression], limits: Sequence[float]) -> None:
        """Minimise the largest ratio of an expression to its limit, in place of the losses."""
        self._losses = [0.0] * len(self._losses)
        ratio = self._add_variables(np.ones(1), False, math.inf)
        for expression, limit in zip(expressions, limits, strict=True):
            scaled = Expression(expression.constant, [*expression.variables], [*expression.factors])
            scaled.add(ratio, -float(limit))
            self.at_most(scaled, 0.0)

    def solve(self, seconds: float = math.inf, gap: float = 0.0) -> Solution:
        """Solve the program.

        Args:
            seconds: after which the best solution so far is returned.
            gap: between value and bound, as a share of the value, at which the solver may stop.
        """
        losses = np.array(self._losses)
        scale = LOSS_SIZE / (np.abs(losses).max(initial=0.0) or 1.0)
        limited = {"time_limit": max(seconds, 0.01)} if math.isfinite(seconds) else {}
        result = milp(
            losses * scale,
            integrality=np.array(self._is_binary, dtype=np.int64),
            bounds=Bounds(0.0, np.array(self._upper)),
            constraints=self._constraints(),
            options={"mip_rel_gap": gap, **limited},
        )
        bound = -math.inf if result.get("mip_dual_bound") is None else result.mip_dual_bound / scale
        if result.x is None:
            return Solution(None, math.inf, bound, "infeasible" if result.status == INFEASIBLE else "time")
        levels = [int(np.argmax(result.x[choice.variables])) for choice in self._choices]
        return Solution(
            levels, float(losses @ result.x), bound, "time" if result.status == TIME else "optimal"
        )

    def _constraints(self) -> LinearConstraint:
        """Return all rows, scaled so that their largest number has one size."""
        sizes = [len(variables) for variables, _ in self._rows]
        scales = [
            ROW_SIZE
            / max(np.abs(factors).max(initial=0.0), *(abs(b) for b in bounds if math.isfinite(b)), 1e-300)
            if not _is_small(factors)
            else 1.0
            for (_, factors), bounds in zip(self._rows, self._row_bounds, strict=True)
        ]
        factors = np.concatenate([row * scale for (_, row), scale in zip(self._rows, scales, strict=True)])
        columns = np.concatenate([variables for variables, _ in self._rows])
        starts = np.cumsum([0, *sizes])
        matrix = csr_matrix((factors, columns, starts), shape=(len(sizes), self.num_variables))
        lower, upper = np.array(self._row_bounds).T * np.array(scales)
        return LinearConstraint(matrix, lower, upper)

    def _add_variables(self, losses: Floats, binary: bool, upper: float = 1.0) -> Indices:
        first = len(self._losses)
        self._losses += losses.tolist()
        self._is_binary += [binary] * len(losses)
        self._upper += [upper] * len(losses)
        return np.arange(first, first + len(losses))

    def _add_choice(self, counts: Indices, losses: Floats, binary: bool) -> Choice:
        choice = Choice(counts, self._add_variables(losses, binary))
        self._alive.append(choice)
        return choice

    def _bounded(self, expression: Expression, lower: float, upper: float) -> None:
        self._rows.append(expression.row())
        self._row_bounds.append((lower - expression.constant, upper - expression.constant))

    def _equal(self, parts: Sequence[tuple[Indices, float]], value: float) -> None:
        expression = Expression()
        for variables, factor in parts:
            expression.add(np.asarray(variables), factor)
        self._bounded(expression, value, value)


def _is_small(factors: Floats) -> bool:
    """Return whether a row holds ones only, as those that link variables do."""
    return bool((np.abs(factors) <= 1).all())
