"""What is left of a network while units are taken from it, and which may still go (level 3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from lightning_prune.graph.channel_graph import ChannelGraph, module_of
from lightning_prune.graph.costs import CostModel, Term
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.incremental_cost import IncrementalCost, entries, layer_incidence, unit_classes
from lightning_prune.selection.layer_patterns import containers, holders
from lightning_prune.selection.limits import Limits, Of, limited

__all__ = ["UnitPool"]

#: what is counted, the number of the account, and the fewest of it that may stay
Gate = tuple[Of, int, int]


class UnitPool:
    """The units of a network, taken one by one as far as limits and multiples allow.

    Units that take part in the same dimensions equally often form a *class*. Costs only fall, so what is once
    forbidden to a unit stays forbidden to its class, which is then shut.

    Args:
        graph: the units and their costs.
        limits: how much of each layer and block may go.
        dense: what "how much" refers to.
        multiple: the channel counts of layers that are cut stay multiples of this.

    Attributes:
        closed: layer or block -> why it loses no more filters.
        sources: the limits that closed something -> what they closed.
    """

    def __init__(self, graph: ChannelGraph, limits: Limits, dense: DenseSizes, multiple: int = 1) -> None:
        self.closed: dict[str, str] = {}
        self.sources: dict[str, list[str]] = {}
        self._multiple = multiple
        self._limits = list(limited(graph, limits).items())
        self._dense = dense
        self._ledgers, self._counted = self._open(graph)
        self._moved = list(
            {id(each): each for each in (*self._ledgers.values(), *self._counted.values())}.values()
        )
        self._class = unit_classes(graph)
        self._left = Counter(self._class)
        self._layers: dict[int, list[tuple[str, int]]] = {}
        self._gates: dict[int, list[Gate]] = {}
        self._describe(graph, limits.strict)
        self._shut: set[int] = set()
        self._waiting: dict[int, list[int]] = {}

    def cost(self, resource: str) -> int:
        """What the network costs now."""
        return self._ledgers[resource].total

    def within(self, targets: Mapping[str, float]) -> bool:
        """Whether every resource is at or below its target."""
        return all(self.cost(resource) <= target for resource, target in targets.items())

    def offer(self, unit: int) -> list[int]:
        """Take a unit, together with those of its class that waited for it to make up a multiple.

        Returns:
            What was taken: nothing if it is forbidden or must wait.
        """
        number = self._class[unit]
        if number in self._shut:
            return []
        waiting = self._waiting.setdefault(number, [])
        waiting.append(unit)
        if len(waiting) < self._batch(number):
            return []
        del self._waiting[number]
        return waiting if self._take(number, waiting) else []

    def put_back(self, units: Iterable[int]) -> None:
        """Undo the taking of ``units``."""
        for unit in units:
            self._left[self._class[unit]] += 1
            for ledger in self._moved:
                ledger.restore([unit])

    def most(self, units: Iterable[int]) -> list[int]:
        """All that could go of each class of ``units`` if nothing of the others went. Shuts every class."""
        by_class: dict[int, list[int]] = {}
        for unit in units:
            by_class.setdefault(self._class[unit], []).append(unit)
        gone: list[int] = []
        for members in by_class.values():
            taken = [unit for member in members for unit in self.offer(member)]
            self.put_back(taken)
            gone += taken
        return gone

    def _open(self, graph: ChannelGraph) -> tuple[dict[str, IncrementalCost], dict[Of, IncrementalCost]]:
        """A ledger per resource, and those that keep an account for each limited layer and block."""
        number = {name: account for account, (name, _) in enumerate(self._limits)}
        layers, blocks = {module_of(name) for name in graph.layers}, containers(graph.layers)

        def accounts(term_layer: str) -> list[int]:
            return [number[name] for name in holders(term_layer, layers, blocks) if name in number]

        booked = {"params": (accounts, len(number))}
        ledgers = {
            name: IncrementalCost(model, *booked.get(name, ())) for name, model in graph.cost_models.items()
        }
        self._spare(graph, ledgers)
        counted: dict[Of, IncrementalCost] = {"params": ledgers["params"]} if "params" in ledgers else {}
        if any(limit.of == "channels" for _, limit in self._limits):
            filters = [Term(name, 1, (units,)) for name, units in graph.layers.items()]
            counted["channels"] = IncrementalCost(CostModel(filters, graph.num_units), accounts, len(number))
        return ledgers, counted

    def _spare(self, graph: ChannelGraph, ledgers: Mapping[str, IncrementalCost]) -> None:
        """Dimensions of parts that may vanish may lose their last channel."""
        for name, model in graph.cost_models.items() if graph.optional else ():
            members = [model.incidence[factor].indices for factor in range(model.incidence.shape[0])]
            empty = [factor for factor, units in enumerate(members) if graph.may_empty(units)]
            ledgers[name].may_empty = frozenset(empty)

    def _describe(self, graph: ChannelGraph, strict: bool) -> None:
        """For each class: its layers with the number of filters per unit, and the gates that may stop it."""
        weights, layers = list(graph.layers), {module_of(name) for name in graph.layers}
        blocks, gates = containers(graph.layers), self._all_gates()
        own = [[gates[n] for n in holders(w, layers, blocks) if n in gates] for w in weights]
        filters = layer_incidence(graph)
        for kind, unit in {kind: unit for unit, kind in reversed(list(enumerate(self._class)))}.items():
            rows = entries(filters, unit)
            self._layers[kind] = [(module_of(weights[row]), count) for row, count in rows]
            touched = self._ledgers["params"].booked(unit) if strict else set()
            also = [gate for gate in gates.values() if gate[0] == "params" and gate[1] in touched]
            self._gates[kind] = sorted({gate for row, _ in rows for gate in own[row]}.union(also))

    def _all_gates(self) -> dict[str, Gate]:
        """Each limited layer or block with what must stay of it; none of parameters if these are not counted."""
        sizes = {"params": self._dense.params, "channels": self._dense.channels}
        return {
            name: (limit.of, account, floor(sizes[limit.of].get(name, 0), limit.share))
            for account, (name, limit) in enumerate(self._limits)
            if limit.of in self._counted
        }

    def _batch(self, number: int) -> int:
        """How many units of a class must go at once, so that its layers keep a multiple."""
        steps = [self._multiple // math.gcd(self._multiple, count) for _, count in self._layers[number]]
        step = math.lcm(*steps)
        return self._left[number] % step or step

    def _take(self, number: int, units: list[int]) -> bool:
        for ledger in self._moved:
            ledger.remove(units)
        self._left[number] -= len(units)
        reasons = self._violations(number, units[0])
        if reasons:
            self.put_back(units)
            self._shut.add(number)
            self.closed.update(reasons)
        return not reasons

    def _violations(self, number: int, unit: int) -> dict[str, str]:
        """What forbids the state just reached: layer or block -> reason."""
        if any(ledger.empties(unit) for ledger in self._ledgers.values()):
            return {name: "at least one filter stays" for name, _ in self._layers[number]}
        if self._multiple > 1 and not self._left[number]:
            return {
                name: f"fewer than {self._multiple} filters would stay" for name, _ in self._layers[number]
            }
        over = [
            self._limits[account]
            for of, account, least in self._gates[number]
            if self._over(of, account, least)
        ]
        for name, limit in over:
            self.sources.setdefault(limit.source, []).append(name)
        return {name: str(limit) for name, limit in over}

    def _over(self, of: Of, account: int, least: int) -> bool:
        return self._counted[of].accounts[account] < least


def floor(dense: int, limit: float) -> int:
    """The fewest of ``dense`` parameters or channels that may stay.

    Example:
        >>> floor(100, 0.75), floor(10, 0.75), floor(10, 0.9)
        (25, 3, 1)
    """
    return math.ceil(dense * (1 - limit) - 1e-6)
