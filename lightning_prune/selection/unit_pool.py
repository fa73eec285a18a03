"""The remaining units during selection, under limits and channel multiples."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Column, CostModel, Term, inverted, number_columns, number_rows
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.selection.channel_widths import ChannelWidths
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.incremental_cost import IncrementalCost, layer_incidence
from lightning_prune.selection.limits import Limits, Quantity, active_limits, minimum_kept

__all__ = ["UnitPool"]

#: a limit in numbers: the quantity, the account that holds its current value, and the smallest value allowed
Bound = tuple[Quantity, int, int]
#: a layer or block, why it loses no more filters, and the argument of the limits that forbids it, if one does
Violation = tuple[str, str, str]


class UnitPool:
    """The units of a network, taken one by one as far as limits and multiples allow.

    Units that occur equally often in every dimension form a *class* and are interchangeable. Costs only fall during
    a selection, so once a unit is forbidden, its whole class stays forbidden: the class is *closed*.

    Args:
        graph: the units and their costs.
        limits: how much of each layer and block may be removed.
        dense: the sizes that limits refer to.
        multiple: channel counts of layers that are cut stay multiples of this. Multiples that operators require
            (``graph.multiples``) are kept in any case.

    Attributes:
        closed: layer or block -> why it loses no more filters.
        sources: arguments of the limits that closed something -> the layers and blocks that they closed.
    """

    def __init__(self, graph: ChannelGraph, limits: Limits, dense: DenseSizes, multiple: int = 1) -> None:
        self.closed: dict[str, str] = {}
        self.sources: dict[str, list[str]] = {}
        self._multiple = multiple
        self._limits = list(active_limits(graph, limits).items())
        self._dense = dense
        self._costs = self._build_costs(graph)
        self._limited = self._limited_costs(graph)
        # The cost in parameters is in both dictionaries, but must be updated once.
        by_identity = {id(cost): cost for cost in (*self._costs.values(), *self._limited.values())}
        self._all_costs = list(by_identity.values())
        filter_kinds, filters = number_columns(layer_incidence(graph))
        self._class = number_rows(filter_kinds, *(cost.kinds for cost in self._costs.values()))
        self._remaining = Counter(self._class)
        self._required = self._required_steps(graph)
        self._layers: dict[int, list[tuple[str, int]]] = {}
        self._bounds: dict[int, list[Bound]] = {}
        self._describe_classes(graph, [filters[kind] for kind in filter_kinds], limits.strict)
        self._widths = ChannelWidths(graph, limits, dense)
        self._without_floor = {self._class[unit] for part in graph.optional for unit in part.tolist()}
        self._closed_classes: set[int] = set()
        self._waiting: dict[int, list[int]] = {}

    @property
    def classes(self) -> Sequence[int]:
        """The class of each unit."""
        return self._class

    def minima(self) -> Iterator[tuple[Quantity | Literal["floor"], str, int, set[int]]]:
        """Yield the quantity of each limit, its layer or block, how much must stay, and the classes it limits.

        As for :meth:`cut_sizes`, the minimum is for the state in which all other classes are whole. A floor is a
        number of channels.
        """
        for (quantity, account, minimum), classes in inverted(self._bounds).items():
            present = self._limited[quantity].accounts[account]
            yield quantity, self._limits[account][0], min(minimum, present), classes
        with_floor = {
            c: [n for n, _ in layers] for c, layers in self._layers.items() if c not in self._without_floor
        }
        for layer, classes in inverted(with_floor).items():
            yield "floor", layer, self._widths.floor(layer), classes

    def cost(self, resource: str) -> int:
        """Return the current cost of the network."""
        return self._costs[resource].total

    def meets(self, targets: Mapping[str, float]) -> bool:
        """Return whether every resource is at or below its target."""
        return all(self.cost(resource) <= target for resource, target in targets.items())

    def offer(self, unit: int) -> list[int]:
        """Take a unit, together with earlier ones of its class that waited until they make up a multiple.

        Returns:
            The units taken; none if the unit is forbidden or has to wait.
        """
        unit_class = self._class[unit]
        if unit_class in self._closed_classes:
            return []
        waiting = self._waiting.setdefault(unit_class, [])
        waiting.append(unit)
        if len(waiting) < self._batch_size(unit_class):
            return []
        del self._waiting[unit_class]
        return waiting if self._take(waiting) else []

    def takes_blocks(self, resources: Iterable[str]) -> bool:
        """Return whether :meth:`take_block` may be used: no multiple is kept, and these costs only fall."""
        single = self._multiple == 1 and all(step == 1 for step in self._required.values())
        return single and all(self._costs[resource].only_falls for resource in resources)

    def take_block(self, units: Iterable[int], is_end: Callable[[], bool]) -> list[int] | None:
        """Take units at once, without those of closed classes, as :meth:`offer` would take them one by one.

        Limits and ends that hold for the state without all of these units hold for each state on the way there,
        because every cost and width only falls.

        Args:
            units: in the order in which they would be offered.
            is_end: whether the selection ends with the present state.

        Returns:
            The units taken. None, with nothing changed, if a limit forbids one or the selection ends with one.
        """
        block = [unit for unit in units if self._class[unit] not in self._closed_classes]
        classes = list(map(self._class.__getitem__, block))
        numbers, firsts = Counter(classes), dict(zip(classes, block, strict=True))
        for unit_class, unit in firsts.items():
            self._shift(unit, -numbers[unit_class])
        if not is_end() and not any(self._violations(unit) for unit in firsts.values()):
            return block
        for unit_class, unit in firsts.items():
            self._shift(unit, numbers[unit_class])
        return None

    def largest_cut(self, units: Iterable[int]) -> list[int]:
        """Return those of ``units`` that may go while no other class is cut; close classes that must keep some."""
        by_class: dict[int, list[int]] = {}
        for unit in units:
            by_class.setdefault(self._class[unit], []).append(unit)
        return [unit for members in by_class.values() for unit in members[: self.cut_sizes(members)[-1]]]

    def cut_sizes(self, members: Sequence[int]) -> list[int]:
        """Return how many of ``members``, units of one class, may go while all other classes stay whole.

        The class is closed if not all of them may go. 0 is always one of the numbers.
        """
        unit, unit_class = members[0], self._class[members[0]]
        sizes = range(self._batch_size(unit_class), len(members) + 1, self._step(unit_class))
        # If a number of units violates a limit, every larger number does: find the first that does.
        first = bisect_left(sizes, True, key=lambda size: bool(self._violations_without(unit, size)))
        if first < len(sizes):
            self._close(unit, self._violations_without(unit, sizes[first]))
        return [0, *sizes[:first]]

    def _violations_without(self, unit: int, number: int) -> list[Violation]:
        """Return the limits that removing ``number`` units of the class of ``unit`` would violate; remove none."""
        self._shift(unit, -number)
        violations = self._violations(unit)
        self._shift(unit, number)
        return violations

    def _shift(self, unit: int, number: int) -> None:
        """Add ``number`` units of the class of ``unit``; a negative number removes them."""
        self._remaining[self._class[unit]] += number
        self._widths.shift(self._layers[self._class[unit]], number)
        for cost in self._all_costs:
            cost.shift(unit, number)

    def _build_costs(self, graph: ChannelGraph) -> dict[str, IncrementalCost]:
        """Return the cost of each resource; that of ``"params"`` has an account for each limited layer and block."""
        accounts = {"params": (self._accounts(graph), len(self._limits))}
        costs = {
            name: IncrementalCost(model, *accounts.get(name, ())) for name, model in graph.cost_models.items()
        }
        # Parts that may vanish, such as residual branches, may lose the last channel of a dimension.
        for name, model in graph.cost_models.items() if graph.optional else ():
            members = [model.incidence[factor].indices for factor in range(model.incidence.shape[0])]
            costs[name].may_empty = frozenset(f for f, units in enumerate(members) if graph.may_empty(units))
        return costs

    def _limited_costs(self, graph: ChannelGraph) -> dict[Quantity, IncrementalCost]:
        """Return the costs that limits refer to, each with an account for each limited layer and block."""
        limited: dict[Quantity, IncrementalCost] = {}
        if "params" in self._costs:
            limited["params"] = self._costs["params"]
        if any(limit.of == "channels" for _, limit in self._limits):
            filters = CostModel(
                [Term(name, 1, (units,)) for name, units in graph.layers.items()], graph.num_units
            )
            limited["channels"] = IncrementalCost(filters, self._accounts(graph), len(self._limits))
        return limited

    def _accounts(self, graph: ChannelGraph) -> Callable[[str], list[int]]:
        """Return the function from a term's layer to the accounts of the limits that it belongs to."""
        account_of = {name: account for account, (name, _) in enumerate(self._limits)}
        tree = graph.layer_tree
        return lambda layer: [account_of[name] for name in tree.owners(layer) if name in account_of]

    def _describe_classes(self, graph: ChannelGraph, filters: Sequence[Column], strict: bool) -> None:
        """Store, for each class, its layers with the number of filters per unit, and the bounds that apply to it."""
        weights, bounds, tree = list(graph.layers), self._all_bounds(), graph.layer_tree
        bounds_of = [[bounds[name] for name in tree.owners(weight) if name in bounds] for weight in weights]
        for unit, unit_class in enumerate(self._class):
            if unit_class in self._layers:  # a class is described by its first unit
                continue
            self._layers[unit_class] = [(module_of(weights[row]), count) for row, count in filters[unit]]
            class_bounds = {bound for row, _ in filters[unit] for bound in bounds_of[row]}
            if strict:
                accounts = self._costs["params"].accounts_of(unit)
                class_bounds |= {b for b in bounds.values() if b[0] == "params" and b[1] in accounts}
            self._bounds[unit_class] = sorted(class_bounds)

    def _all_bounds(self) -> dict[str, Bound]:
        """Return the bound of each limited layer or block; those of parameters only if parameters are counted."""
        sizes = {"params": self._dense.params, "channels": self._dense.channels}
        return {
            name: (limit.of, account, minimum_kept(sizes[limit.of].get(name, 0), limit.share))
            for account, (name, limit) in enumerate(self._limits)
            if limit.of in self._limited
        }

    def _multiple_step(self, unit_class: int) -> int:
        """Return the number of units of a class of which a multiple must stay, so that its layers keep a multiple."""
        counts = (count for _, count in self._layers[unit_class])
        return math.lcm(*(self._multiple // math.gcd(self._multiple, count) for count in counts))

    def _step(self, unit_class: int) -> int:
        """Return how many units of a class must go at once after the first batch."""
        return math.lcm(self._multiple_step(unit_class), self._required[unit_class])

    def _batch_size(self, unit_class: int) -> int:
        """Return how many units of a class must go next at once, so that its layers keep a multiple.

        If no number of them would do, it is more than remain.
        """
        step, required = self._multiple_step(unit_class), self._required[unit_class]
        remaining = self._remaining[unit_class]
        # The first batch brings the width down to a multiple, each later one to the next multiple.
        sizes = range(required, self._step(unit_class) + 1, required)
        return next((size for size in sizes if (remaining - size) % step == 0), remaining + 1)

    def _required_steps(self, graph: ChannelGraph) -> dict[int, int]:
        """Return class -> the number that cuts of it must be a multiple of, so that operators still run."""
        steps = dict.fromkeys(self._class, 1)
        for each in graph.multiples:
            counts = Counter(unit for unit in each.units.tolist() if unit >= 0)
            for unit_class, count in {self._class[unit]: count for unit, count in counts.items()}.items():
                step = each.number // math.gcd(each.number, count)
                steps[unit_class] = math.lcm(steps[unit_class], step)
        return steps

    def _take(self, units: list[int]) -> bool:
        """Remove units of one class; put them back and close the class if that violates a limit."""
        # Remove first and check afterwards: limits apply to the state that results.
        self._shift(units[0], -len(units))
        violations = self._violations(units[0])
        if violations:
            self._shift(units[0], len(units))
            self._close(units[0], violations)
        return not violations

    def _close(self, unit: int, violations: Iterable[Violation]) -> None:
        """Close the class of ``unit``, and store the reasons."""
        self._closed_classes.add(self._class[unit])
        for name, reason, source in violations:
            self.closed[name] = reason
            if source:
                self.sources.setdefault(source, []).append(name)

    def _violations(self, unit: int) -> list[Violation]:
        """Return the limits that the present state violates, after units of the class of ``unit`` were removed."""
        unit_class = self._class[unit]
        if any(cost.is_emptied(unit) for cost in self._costs.values()):
            return self._for_all_layers(unit_class, "at least one filter stays")
        if self._multiple > 1 and not self._remaining[unit_class]:
            return self._for_all_layers(unit_class, f"fewer than {self._multiple} filters would stay")
        violated = [
            self._limits[account]
            for quantity, account, minimum in self._bounds[unit_class]
            if self._limited[quantity].accounts[account] < minimum
        ]
        below = (
            {} if unit_class in self._without_floor else self._widths.below_floor(self._layers[unit_class])
        )
        reasons = self._widths.reasons(below)
        return [
            *((name, str(limit), limit.source) for name, limit in violated),
            *((name, reasons[name], floor.source) for name, floor in below.items()),
        ]

    def _for_all_layers(self, unit_class: int, reason: str) -> list[Violation]:
        return [(name, reason, "") for name, _ in self._layers[unit_class]]
