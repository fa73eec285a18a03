"""Optimal selection: the widths that keep the most importance under all budgets, by an integer program."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.integer_program import Expression, Solution
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.selection.width_grids import WidthGrids, width_choices
from lightning_prune.selection.width_program import WidthChoice, WidthProgram

__all__ = ["OptimalSelection", "OptimalUnits", "Selection", "optimal_units", "sorted_units", "units_at"]

#: how units are selected
Selection = Union[Literal["greedy", "optimal"], "OptimalSelection"]
FEWEST_WIDTHS = 3
REFINEMENTS = 4  # finer grids around a solution
CORRECTIONS = 3  # solutions that miss a budget, because a term was linearised or a number rounded


@dataclass(frozen=True)
class OptimalSelection:
    """How an optimal selection is computed.

    Among the widths of each group of interchangeable channels, those are chosen that remove the least importance and
    meet all budgets at once. Convolutions cost by their input and output widths together; this is exact (see
    :class:`~lightning_prune.selection.integer_program.IntegerProgram`). A class with more widths than ``widths`` is
    first solved on a coarser grid, and then on finer ones around the solution.

    Args:
        time_limit: seconds for each selection; then the best plan so far is taken, with a warning.
        gap: how much more importance than necessary the plan may remove, as a share, for the solver to stop.
        widths: largest number of widths of each class in one program.
        variables: largest number of variables of one program; larger ones get fewer widths.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> OptimalSelection(time_limit=10).widths
        12
    """

    time_limit: float = 60.0
    gap: float = 1e-3
    widths: int = 12
    variables: int = 200_000

    def __post_init__(self) -> None:
        if not self.time_limit > 0 or not 0 <= self.gap < 1:
            raise ValueError(
                f"need time_limit > 0 and gap in [0, 1), got {self.time_limit!r} and {self.gap!r}"
            )
        if self.widths < FEWEST_WIDTHS or self.variables < 1:
            raise ValueError(
                f"need widths >= {FEWEST_WIDTHS} and variables >= 1, got {self.widths!r} and {self.variables!r}"
            )

    @classmethod
    def of(cls, selection: Any) -> OptimalSelection | None:
        """Return the settings that an argument ``selection`` means, None for ``"greedy"``.

        Raises:
            ValueError: it is neither ``"greedy"`` nor ``"optimal"`` nor settings.

        Example:
            >>> OptimalSelection.of("greedy"), OptimalSelection.of("optimal") == OptimalSelection()
            (None, True)
        """
        if isinstance(selection, cls):
            return selection
        if selection not in ("greedy", "optimal"):
            raise ValueError(
                f"selection must be 'greedy', 'optimal' or OptimalSelection(...), got {selection!r}"
            )
        return None if selection == "greedy" else cls()


@dataclass(frozen=True)
class OptimalUnits:
    """Result of an optimal selection.

    Attributes:
        units: to remove, the least important first.
        gap: how much more importance than necessary they may have, as a share of theirs; infinite if unknown.
        met: whether all budgets are met. If not, nothing meets them, and the plan comes as near as possible.
    """

    units: list[int]
    gap: float
    met: bool


def optimal_units(
    graph: ChannelGraph,
    pool: UnitPool,
    ranking: Sequence[int],
    importance: NDArray[np.float64],
    targets: Mapping[str, float],
    settings: OptimalSelection,
    fallback: Sequence[int] = (),
) -> OptimalUnits:
    """Return the units of least importance in all whose removal meets every target.

    Args:
        graph: of the network.
        pool: of its units, none of which is taken.
        ranking: the units that may be removed, the least important first.
        importance: of each unit, shape (num_units,).
        targets: resource -> cost that may remain.
        settings: time and size of the programs.
        fallback: the units of another selection: taken if they are better, or the time runs out before there is
            anything else. Terms of many classes are linearised at its widths.
    """
    return _Search(graph, pool, ranking, importance, targets, settings, fallback).run()


class _Search:
    """Solves programs on finer and finer grids; see :func:`optimal_units`."""

    def __init__(
        self,
        graph: ChannelGraph,
        pool: UnitPool,
        ranking: Sequence[int],
        importance: NDArray[np.float64],
        targets: Mapping[str, float],
        settings: OptimalSelection,
        fallback: Sequence[int],
    ) -> None:
        self.graph, self.pool, self.targets, self.settings = graph, pool, dict(targets), settings
        self.choices = width_choices(pool, ranking, importance)
        self.grids = WidthGrids(graph, pool, self.choices, targets)
        self.deadline = time.perf_counter() + settings.time_limit
        self.fallback, self.importance = list(fallback), importance
        self.best = self.fallback if self._misses(self.fallback) == {} else None

    def run(self) -> OptimalUnits:
        """Solve on a coarse grid and then on finer ones; where no plan meets the targets, return the nearest."""
        grid = self._coarse_grid()
        if grid is None:
            return self._fallback("there are too many classes of channels for one program", math.inf)
        solution = self._solve(grid)
        if solution.levels is None and solution.status == "infeasible" and self.best is None:
            return OptimalUnits(self._nearest(grid), math.inf, False)
        for _ in range(REFINEMENTS):
            if solution.levels is None or solution.status == "time" or self.grids.is_complete(grid):
                break
            grid = self.grids.fine(grid, solution.levels, self.settings.widths)
            finer = self._solve(grid)
            is_better = finer.value < solution.value - 1e-6 * abs(solution.value)
            solution = finer if finer.levels is not None else solution
            if not is_better:
                break
        return self._result(solution)

    def _result(self, solution: Solution) -> OptimalUnits:
        """Return the best plan so far; warn if the solver had to stop early."""
        loss = math.inf if self.best is None else float(self.importance[self.best].sum())
        excess = max(loss - solution.bound, 0.0)
        gap = float(excess / max(abs(loss), 1e-300)) if math.isfinite(loss) else math.inf
        if solution.status == "time":
            return self._fallback(f"the solver ran out of its {self.settings.time_limit:g} s", gap)
        return OptimalUnits(sorted_units(self.best or [], self.importance), gap, self.best is not None)

    def _fallback(self, reason: str, gap: float) -> OptimalUnits:
        """Return the best plan so far, with a warning that says how good it is."""
        best = self.fallback if self.best is None else self.best
        quality = (
            f"removes at most {gap:.1%} more importance than necessary" if gap < 1 else "may be far from it"
        )
        if self.best is None:
            quality = "does not meet the budget"
        warnings.warn(f"the selection is not optimal: {reason}; the best plan so far {quality}", stacklevel=6)
        return OptimalUnits(sorted_units(best, self.importance), gap, self.best is not None)

    def _coarse_grid(self) -> list[WidthChoice] | None:
        """Return the finest grid whose program is not too large; None if there is none."""
        number = self.settings.widths
        while number >= FEWEST_WIDTHS:
            grid = self.grids.coarse(number, self._removed(self.fallback))
            if self._program(grid, {})[0].program.num_variables <= self.settings.variables:
                return grid
            number = min(number - 1, number * 2 // 3)
        return None

    def _program(
        self, grid: Sequence[WidthChoice], kept: Mapping[int, int]
    ) -> tuple[WidthProgram, dict[str, Expression]]:
        """Return the program of a grid, and the cost in each resource that has a target."""
        reference = {c.unit_class: c.size - self._removed(self.fallback)[c.unit_class] for c in grid}
        program = WidthProgram(self.graph, self.pool, grid, {**reference, **kept})
        program.add_minima()
        return program, {resource: program.cost(self.graph.terms[resource]) for resource in self.targets}

    def _solve(self, grid: Sequence[WidthChoice]) -> Solution:
        """Solve on a grid; again with lower targets while the solution misses one, as linearised terms may."""
        targets, kept = dict(self.targets), dict[int, int]()
        for _ in range(CORRECTIONS):
            program, costs = self._program(grid, kept)
            for resource, expression in costs.items():
                program.program.at_most(expression, targets[resource])
            solution = program.program.solve(self.deadline - time.perf_counter(), self.settings.gap)
            if solution.levels is None:
                return solution
            units = units_at(grid, solution.levels)
            misses = self._misses(units)
            if not misses:
                self._keep(units)
                return solution
            targets = {resource: target - misses.get(resource, 0.0) for resource, target in targets.items()}
            kept = {c.unit_class: c.kept[level] for c, level in zip(grid, solution.levels, strict=True)}
        return replace(solution, levels=None, value=math.inf)

    def _nearest(self, grid: Sequence[WidthChoice]) -> list[int]:
        """Return the units whose removal leaves the smallest multiple of all targets."""
        program, costs = self._program(grid, {})
        program.program.minimise_ratio(list(costs.values()), list(self.targets.values()))
        solution = program.program.solve(self.deadline - time.perf_counter(), self.settings.gap)
        units = self.fallback if solution.levels is None else units_at(grid, solution.levels)
        return sorted_units(units, self.importance)

    def _keep(self, units: list[int]) -> None:
        """Keep a plan that meets all targets, if it is the best."""
        if self.best is None or self.importance[units].sum() < self.importance[self.best].sum():
            self.best = units

    def _misses(self, units: Sequence[int]) -> dict[str, float]:
        """Return by how much the network without these units is above each target that it misses."""
        excess = {r: self.graph.cost(r, units) - target for r, target in self.targets.items()}
        return {resource: amount for resource, amount in excess.items() if amount > 0}

    def _removed(self, units: Sequence[int]) -> dict[int, int]:
        """Return how many of these units belong to each class."""
        numbers = Counter(self.pool.classes[unit] for unit in units)
        return {choice.unit_class: numbers[choice.unit_class] for choice in self.choices}


def sorted_units(units: Sequence[int], importance: NDArray[np.float64]) -> list[int]:
    """Return units by importance, the lowest first."""
    return sorted(units, key=lambda unit: (importance[unit], unit))


def units_at(grid: Sequence[WidthChoice], levels: Sequence[int]) -> list[int]:
    """Return the units that are removed at the chosen levels."""
    return [
        unit
        for choice, level in zip(grid, levels, strict=True)
        for unit in choice.units[: choice.removed[level]]
    ]
