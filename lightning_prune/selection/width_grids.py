"""Widths to choose from: all that limits and multiples allow, or as many of them as a program can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.selection.width_program import WidthChoice, WidthProgram

__all__ = ["WidthGrids", "width_choices"]

Costs = NDArray[np.float64]


def width_choices(
    pool: UnitPool, ranking: Sequence[int], importance: NDArray[np.float64]
) -> list[WidthChoice]:
    """Return all widths of each class of which units may be removed.

    Args:
        pool: of units, none of which is taken.
        ranking: the units that may be removed, the least important first.
        importance: of each unit.
    """
    sizes, members = np.bincount(np.array(pool.classes, dtype=np.int64)), dict[int, list[int]]()
    for unit in ranking:
        members.setdefault(pool.classes[unit], []).append(unit)
    choices = []
    for unit_class, units in members.items():
        losses = np.concatenate([[0.0], np.cumsum(importance[units])])
        removed = pool.cut_sizes(units)
        if len(removed) > 1:
            choices.append(WidthChoice(unit_class, units, int(sizes[unit_class]), removed, losses))
    return choices


@dataclass
class WidthGrids:
    """Chooses some of the widths of each class, where steps in the costs are worth it.

    Kernels work on blocks of channels, so costs rise in steps: the widths kept are those at the ends of steps. A
    width that costs as much as a larger one is left out.

    Args:
        graph: of the network.
        pool: of its units, none of which is taken.
        choices: all widths of each class.
        targets: resource -> its budget.
    """

    graph: ChannelGraph
    pool: UnitPool
    choices: Sequence[WidthChoice]
    targets: Mapping[str, float]

    def __post_init__(self) -> None:
        self._costs: dict[int, Costs] = {}
        self._by_class = {choice.unit_class: choice for choice in self.choices}

    def coarse(self, number: int, removed: Mapping[int, int]) -> list[WidthChoice]:
        """Return at most ``number`` widths of each class, from the smallest to the largest.

        Args:
            number: of widths.
            removed: class -> removed units of another plan; its widths are among those returned.
        """
        return [
            self._thinned(choice, list(range(len(choice.removed))), _place(choice, removed), number)
            for choice in self.choices
        ]

    def fine(self, grid: Sequence[WidthChoice], levels: Sequence[int], number: int) -> list[WidthChoice]:
        """Return at most ``number`` widths of each class between the neighbours of the chosen ones.

        Args:
            grid: the widths from which they were chosen.
            levels: index of the chosen width of each class.
            number: of widths.
        """
        finer = []
        for choice, level in zip(grid, levels, strict=True):
            whole = self._by_class[choice.unit_class]
            low, high = (
                choice.removed[max(level - 1, 0)],
                choice.removed[min(level + 1, len(choice.removed) - 1)],
            )
            places = [place for place, size in enumerate(whole.removed) if low <= size <= high]
            finer.append(self._thinned(whole, places, whole.removed.index(choice.removed[level]), number))
        return finer

    def is_complete(self, grid: Sequence[WidthChoice]) -> bool:
        """Return whether a grid has all widths."""
        return all(len(c.removed) == len(self._by_class[c.unit_class].removed) for c in grid)

    def _thinned(self, choice: WidthChoice, places: list[int], keep: int, number: int) -> WidthChoice:
        """Return a choice with at most ``number`` of the widths at ``places``: the ends, ``keep``, and bargains."""
        if len(places) > number:
            bargains = self._bargains(choice)
            inner = np.array_split(np.array(places[1:-1]), max(number - 3, 1))
            best = {int(part[np.argmax(bargains[part])]) for part in inner if len(part)}
            places = sorted({places[0], places[-1], keep, *best})
        return replace(choice, removed=[choice.removed[place] for place in places])

    def _bargains(self, choice: WidthChoice) -> Costs:
        """Return, for each width, the share of units that stays less the share of the costs; -inf if dominated."""
        if choice.unit_class not in self._costs:
            self._costs[choice.unit_class] = self._relative_costs(choice)
        costs = self._costs[choice.unit_class]
        # Removed units ascend, so each width is compared with the least cost of all larger widths.
        cheapest_larger = np.minimum.accumulate(costs, axis=1)[:, :-1]
        dominated = np.append(False, (cheapest_larger <= costs[:, 1:]).all(0))
        total = costs.sum(0)
        share = (total - total.min()) / max(float(np.ptp(total)), 1e-12)
        kept = 1 - np.array(choice.removed) / choice.removed[-1]
        return np.where(dominated, -np.inf, kept - share)

    def _relative_costs(self, choice: WidthChoice) -> Costs:
        """Return the share of its budget that each resource takes by the width, others whole: (resources, widths)."""
        program = WidthProgram(self.graph, self.pool, [choice], {})
        members = np.flatnonzero(np.array(self.pool.classes) == choice.unit_class)
        costs = []
        for resource, target in self.targets.items():
            variables, factors = program.cost(_terms_with(self.graph.terms[resource], members)).row()
            row = np.zeros(len(choice.removed))
            row[variables] = factors
            costs.append(row / max(target, 1.0))
        return np.array(costs)


def _place(choice: WidthChoice, removed: Mapping[int, int]) -> int:
    number = removed.get(choice.unit_class, 0)
    return choice.removed.index(number) if number in choice.removed else 0


def _terms_with(terms: Sequence[Term], units: NDArray[np.int64]) -> list[Term]:
    """Return the terms that depend on some units of one class."""
    first = units[0]
    return [term for term in terms if any((factor == first).any() for factor in term.factors)]
