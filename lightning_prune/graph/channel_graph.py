"""What depends on what: units, bindings, costs, and why some units must stay (level 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.costs import CostModel, Term
from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.tracker import Tracker

__all__ = ["ChannelGraph", "CostModel", "DenseTrace", "Resource", "Term", "Units"]


def module_of(weight: str) -> str:
    """The module that owns a parameter.

    Example:
        >>> module_of("encoder.conv1.weight")
        'encoder.conv1'
    """
    return weight.rpartition(".")[0] or weight


class Resource(Protocol):
    """Anything that channels cost: ``resource(graph) -> terms``, called on every graph that is traced.

    Costs are whole numbers, and should not rise when channels go. See :mod:`lightning_prune.graph.layer_costs`.
    """

    def __call__(self, graph: ChannelGraph) -> Sequence[Term]:
        """What sums up to the resource for the network of ``graph``."""


@dataclass(eq=False)
class DenseTrace:
    """What the trace met, kept so that the trace of the smaller network can be held against it."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    tracker: Tracker
    modes: tuple[bool, ...]
    components: Units
    unit_of: Units
    pinned: NDArray[np.bool_]


@dataclass
class ChannelGraph:
    """The units of a network, where they are bound, and what they cost. Made by :func:`~lightning_prune.trace`.

    A *unit* is the smallest set of channels that can only be removed together. Units are numbered from 0.

    Attributes:
        bindings: parameter or buffer name -> dimension -> unit of each index, for every dimension whose
            channels are known to units (those that never shrink are absent).
        layers: qualified name of a weight -> unit of each of its filters.
        filter_dims: qualified name of a weight -> the dimension its filters are counted along.
        prunable: the units that may be removed, sorted.
        pinned: unit -> why it must stay.
        unsupported: operators without a rule that were met, each with the modules that called it.
        notes: what a user should know about the trace (a mode that could not be run, a branch that was taken).
        types: qualified name of each module -> its class.
        evidence: what :func:`~lightning_prune.prune_` needs to prove its cut; None in a graph made by hand.
        statistics_units: units that meet an operator that takes statistics across channels (layer norm, ...):
            removing one is sound, but it changes the values of the others.
        optional: for each part that may vanish, its units: it may lose the last of them, but not with other parts
            together.
    """

    num_units: int
    bindings: dict[str, dict[int, Units]]
    layers: dict[str, Units]
    filter_dims: dict[str, int]
    pinned: dict[int, str]
    terms: dict[str, list[Term]]
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    statistics_units: Units = field(default_factory=lambda: np.empty(0, np.int64))
    notes: list[str] = field(default_factory=list)
    types: dict[str, type] = field(default_factory=dict)
    evidence: DenseTrace | None = None
    optional: list[Units] = field(default_factory=list)

    @cached_property
    def prunable(self) -> Units:
        """Units that are some layer's filters and are not pinned, sorted."""
        filters = np.unique(np.concatenate(list(self.layers.values()) or [np.empty(0, np.int64)]))
        return filters[~np.isin(filters, list(self.pinned))]

    @cached_property
    def cost_models(self) -> dict[str, CostModel]:
        """Resource -> its exact cost model."""
        return {name: CostModel(terms, self.num_units) for name, terms in self.terms.items()}

    def with_resources(self, resources: Mapping[str, Resource]) -> ChannelGraph:
        """The same graph with further resources beside ``"macs"`` and ``"params"``, by name.

        Raises:
            ValueError: a name is taken by the engine, which proves its cuts by it.

        Example:
            >>> graph = ChannelGraph(3, {}, {"a.weight": np.arange(3)}, {"a.weight": 0}, {}, {})
            >>> filters = lambda graph: [Term(name, 1, (units,)) for name, units in graph.layers.items()]
            >>> graph.with_resources({"filters": filters}).cost("filters", remove=[1])
            2
        """
        for name in resources:
            if name in ("macs", "params"):
                raise ValueError(f"the resource {name!r} is counted by the engine; choose another name")
        return replace(self, terms={**self.terms, **{name: list(of(self)) for name, of in resources.items()}})

    def kept(self, remove: Iterable[int] = ()) -> NDArray[np.bool_]:
        """Mask over units, False for those in ``remove``, shape (num_units,)."""
        mask = np.ones(self.num_units, dtype=bool)
        mask[np.asarray(list(remove), dtype=np.int64)] = False
        return mask

    def cost(self, resource: str = "macs", remove: Iterable[int] = ()) -> int:
        """What the network costs once the units in ``remove`` are gone; exact, nothing is run.

        Args:
            resource: ``"macs"`` (multiply-accumulates of one forward on the traced input), ``"params"``, or one of
                :meth:`with_resources`.
            remove: unit numbers.

        Raises:
            ValueError: the resource is unknown.
        """
        if resource not in self.cost_models:
            known = ", ".join(sorted(self.cost_models))
            raise ValueError(f"unknown resource {resource!r}; this graph knows {known}")
        return self.cost_models[resource].total(self.kept(remove))

    def may_empty(self, units: Units) -> bool:
        """Whether a dimension of these units may lose them all: they belong to one part that may vanish."""
        return any(bool(np.isin(units, part).all()) for part in self.optional)

    def widths(self, remove: Iterable[int] = ()) -> Mapping[str, int]:
        """Number of filters that each layer keeps."""
        kept = self.kept(remove)
        return {name: int(kept[units].sum()) for name, units in self.layers.items()}

    def explain(self, layer: str) -> str:
        """Say in words what removing a filter of ``layer`` means.

        Args:
            layer: qualified name of a weight in ``layers``, or of its module.

        Returns:
            A few lines: how many units its filters form, which layers shrink along, what a unit costs, and why
            units are pinned.

        Raises:
            KeyError: there is no such layer; the message has the nearest names.

        Example:
            >>> import torch
            >>> from lightning_prune import trace
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
            >>> print(trace(net, torch.zeros(1, 3, 16, 16)).explain("0"))
            0.weight: 8 filters in 8 units, 8 of them prunable
              shrink along: 0.bias (dimension 0), 2.weight (dimension 1)
              one unit costs 5684 macs, 30 params
        """
        name = self._layer(layer)
        units = self.layers[name]
        free = np.intersect1d(units, self.prunable)
        lines = [
            f"{name}: {len(units)} filters in {len(np.unique(units))} units, {len(free)} of them prunable"
        ]
        beside = ", ".join(
            f"{other} (dimension {dim})"
            for other, dim in self._bound(units)
            if (other, dim) != (name, self.filter_dims[name])
        )
        lines.append(f"  shrink along: {beside or 'nothing'}")
        if len(free):
            costs = (f"{self.cost(r) - self.cost(r, free[:1])} {r}" for r in self.cost_models)
            lines.append(f"  one unit costs {', '.join(costs)}")
        if np.isin(units, self.statistics_units).any():
            lines.append("  meets statistics across channels: removing one changes the values of the others")
        reasons = Counter(self.pinned[unit] for unit in units.tolist() if unit in self.pinned)
        lines += [f"  {count} pinned: {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)

    def _layer(self, name: str) -> str:
        found = name if name in self.layers else f"{name}.weight"
        if found not in self.layers:
            near = get_close_matches(name, self.layers, n=3, cutoff=0.3)
            raise KeyError(f"no layer {name!r}; did you mean {' or '.join(near) or 'one of graph.layers'}?")
        return found

    def _bound(self, units: Units) -> Iterator[tuple[str, int]]:
        """Dimensions of parameters that any of the units runs along."""
        for name, dims in self.bindings.items():
            for dim, bound in dims.items():
                if np.isin(bound, units).any():
                    yield name, dim
