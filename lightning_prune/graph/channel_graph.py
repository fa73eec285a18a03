"""The channel graph: units, the tensors that they are bound to, their costs, and the reasons why some are pinned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.costs import CostModel, Term
from lightning_prune.graph.layer_tree import LayerTree
from lightning_prune.graph.picture import Picture, draw
from lightning_prune.graph.summary import NetworkSummary, summarise
from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.tracker import Tracker
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.formatting import counted, si

__all__ = ["ChannelGraph", "CostModel", "DenseTrace", "Multiple", "Resource", "Term", "Units"]


class Resource(Protocol):
    """A function ``resource(graph) -> terms`` that computes the cost of a network, called on every traced graph.

    Costs are whole numbers, and should not rise when channels are removed. See
    :class:`~lightning_prune.graph.layer_costs.LayerCost` for the cost of single layers.
    """

    def __call__(self, graph: ChannelGraph) -> Sequence[Term]:
        """Return the terms whose sum is the cost of the network of ``graph``."""


@dataclass(eq=False)
class DenseTrace:
    """The trace of a network before a cut, with which the trace of the smaller network is compared.

    Attributes:
        examples: inputs of the forwards that were followed; MACs are those of the first.
        tracker: the operators, ties, pins and sizes of the trace.
        modes: values of ``training`` in which the forward ran.
        components: the component of tied ids that each id belongs to.
        unit_of: the unit of each component, -1 for components without a unit.
        pinned: mask over components, True for those that must stay.
        blocks: the residual blocks of the network, once they have been looked for.
    """

    examples: tuple[Example, ...]
    tracker: Tracker
    modes: tuple[bool, ...]
    components: Units
    unit_of: Units
    pinned: NDArray[np.bool_]
    blocks: Any = None


@dataclass(frozen=True)
class Multiple:
    """The unit of each index along a dimension that must keep a multiple of ``number`` indices, and what needs it."""

    units: Units
    number: int
    where: str


@dataclass(repr=False)
class ChannelGraph:
    """The units of a network, the tensors they are bound to, and their costs. Made by :func:`~lightning_prune.trace`.

    A *unit* is the smallest set of channels that can only be removed together. Units are numbered from 0.

    Attributes:
        num_units: number of units.
        bindings: parameter or buffer name -> dimension -> unit of each index, without dimensions that never shrink.
        layers: qualified name of a weight -> unit of each of its filters.
        filter_dims: qualified name of a weight -> the dimension along which its filters are stacked.
        pinned: unit -> reason why it must not be removed.
        terms: resource -> the terms whose sum is its cost.
        unsupported: each operator without a rule -> the modules that called it.
        statistics_units: units over which an operator takes statistics across channels (layer norm, softmax, ...).
            They may be removed, but this changes the values of the remaining ones.
        notes: remarks on the trace for the user (a mode that could not be run, a branch that was taken).
        types: qualified name of each module -> its class.
        evidence: the trace, with which :func:`~lightning_prune.prune_` proves its cut; None in a graph made by hand.
        optional: for each part of the network that may vanish, the units that are only in that part.
        multiples: dimensions that must keep a multiple of a number of indices, as grouped products of experts do.
        gone: parameters of residual blocks that have vanished -> the class of their module. Limits and exclusions may
            still name them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> len(graph.prunable), graph.cost("params")  # 3 * 2 + 3, and 3 + 1
        (3, 13)
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
    multiples: list[Multiple] = field(default_factory=list)
    gone: dict[str, type] = field(default_factory=dict)

    @cached_property
    def prunable(self) -> Units:
        """The units that may be removed: those with filters that are not pinned, sorted."""
        has_filters = np.zeros(self.num_units, dtype=bool)
        has_filters[np.concatenate([*self.layers.values(), np.empty(0, np.int64)])] = True
        filters = np.flatnonzero(has_filters)
        return filters[~np.isin(filters, list(self.pinned))]

    @cached_property
    def layer_tree(self) -> LayerTree:
        """The layers and the blocks that contain them, by qualified name."""
        return LayerTree.of(self.layers)

    @cached_property
    def cost_models(self) -> dict[str, CostModel]:
        """Resource -> the cost model of its terms."""
        return {name: CostModel(terms, self.num_units) for name, terms in self.terms.items()}

    def with_resources(self, resources: Mapping[str, Resource]) -> ChannelGraph:
        """Return the same graph with further resources in addition to ``"macs"`` and ``"params"``.

        Args:
            resources: name -> resource.

        Raises:
            ValueError: a resource is named ``"macs"`` or ``"params"``, which the proof of a cut relies on.

        Example:
            >>> graph = ChannelGraph(3, {}, {"a.weight": np.arange(3)}, {"a.weight": 0}, {}, {})
            >>> filters = lambda graph: [Term(name, 1, (units,)) for name, units in graph.layers.items()]
            >>> graph.with_resources({"filters": filters}).cost("filters", remove=[1])
            2
        """
        for name in resources:
            if name in ("macs", "params"):
                raise ValueError(f"the resource {name!r} is built in; choose another name")
        terms = {name: list(resource(self)) for name, resource in resources.items()}
        return replace(self, terms={**self.terms, **terms})

    def kept(self, remove: Iterable[int] = ()) -> NDArray[np.bool_]:
        """Return a mask over units, False for those in ``remove``, shape (num_units,)."""
        mask = np.ones(self.num_units, dtype=bool)
        units = remove if isinstance(remove, np.ndarray) else list(remove)
        mask[np.asarray(units, dtype=np.int64)] = False
        return mask

    def cost(self, resource: str = "macs", remove: Iterable[int] = ()) -> int:
        """Return the exact cost of the network without some units, computed without running it.

        Args:
            resource: ``"macs"`` (multiply-accumulates of one forward on the traced input), ``"params"`` (number of
                parameters), or one added by :meth:`with_resources`.
            remove: numbers of the units to remove.

        Raises:
            ValueError: the resource is unknown.
        """
        if resource not in self.cost_models:
            names = ", ".join(sorted(self.cost_models))
            raise ValueError(f"unknown resource {resource!r}; this graph has {names}")
        return self.cost_models[resource].total(self.kept(remove))

    def may_empty(self, units: Units) -> bool:
        """Return whether a dimension of these units may lose all of them: one part that may vanish has them all."""
        return any(bool(np.isin(units, part).all()) for part in self.optional)

    def widths(self, remove: Iterable[int] = ()) -> Mapping[str, int]:
        """Return the number of filters of each layer without the units in ``remove``."""
        kept = self.kept(remove)
        return {name: int(kept[units].sum()) for name, units in self.layers.items()}

    def explain(self, layer: str) -> str:
        """Describe what the removal of a filter of ``layer`` means for the rest of the network.

        Args:
            layer: qualified name of a weight in ``layers``, or of its module.

        Returns:
            A few lines of text: the number of its units, the tensors that shrink together with it, the cost of one
            unit, and the reasons why units are pinned.

        Raises:
            KeyError: there is no such layer; the message suggests the nearest names.

        Example:
            >>> import torch
            >>> from lightning_prune import trace
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
            >>> print(trace(net, torch.zeros(1, 3, 16, 16)).explain("0"))
            0.weight: 8 filters in 8 units, 8 of them prunable
              shrink along: 0.bias (dimension 0), 2.weight (dimension 1)
              one unit costs 5684 macs, 30 params
        """
        name = self._weight_name(layer)
        units = self.layers[name]
        free = np.intersect1d(units, self.prunable)
        lines = [
            f"{name}: {counted(len(units), 'filter')} in {counted(len(np.unique(units)), 'unit')}, "
            f"{len(free)} of them prunable"
        ]
        dependent = ", ".join(
            f"{other} (dimension {dim})"
            for other, dim in self._dims_of(units)
            if (other, dim) != (name, self.filter_dims[name])
        )
        lines.append(f"  shrink along: {dependent or 'nothing'}")
        if len(free):
            costs = (f"{self.cost(name) - self.cost(name, free[:1])} {name}" for name in self.cost_models)
            lines.append(f"  one unit costs {', '.join(costs)}")
        if np.isin(units, self.statistics_units).any():
            lines.append("  meets statistics across channels: removing one changes the values of the others")
        reasons = Counter(self.pinned[unit] for unit in units.tolist() if unit in self.pinned)
        lines += [f"  {count} pinned: {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)

    def without_trace(self) -> ChannelGraph:
        """Return the same graph without the trace, which holds most of its memory; it cannot prove a cut."""
        graph = copy(self)
        graph.evidence = None
        return graph

    def summary(self, remove: Iterable[int] = ()) -> NetworkSummary:
        """Return channels, costs, pins and couplings of each layer, also without the units in ``remove``.

        Printed, it fits the terminal; as the last value of a notebook's cell it is a table; ``save`` writes it.
        """
        return summarise(self, remove)

    def show(self, path: str | Path | None = None, remove: Iterable[int] = ()) -> Picture:
        """Draw the layers, who reads whose channels, and which layers are coupled.

        From left to right is the order of the forward, from top to bottom the resolution, so that a U-Net has the
        shape of a U. Coupled layers share a colour and a letter. A network of more than 90 layers is drawn with
        coupled layers as one node; save it as ``.svg`` or ``.pdf`` to zoom in.

        Args:
            path: file to write, ``.png``, ``.svg`` or ``.pdf``; None: none.
            remove: units of which each layer shows what is left.

        Returns:
            The figure, which a notebook shows.
        """
        return draw(self, self.kept(remove), path)

    def __repr__(self) -> str:
        costs = ", ".join(f"{si(self.cost(name))} {name}" for name in self.cost_models)
        facts = [
            counted(len(self.layers), "layer"),
            f"{counted(self.num_units, 'unit')}, {len(self.prunable)} prunable",
        ]
        facts += [costs] if costs else []
        facts += [f"{counted(len(self.unsupported), 'operator')} without a rule"] if self.unsupported else []
        return f"ChannelGraph({'; '.join(facts)})"

    def _repr_html_(self) -> str:
        return self.summary().html()

    def _weight_name(self, layer: str) -> str:
        weight = layer if layer in self.layers else f"{layer}.weight"
        if weight not in self.layers:
            near = get_close_matches(layer, self.layers, n=3, cutoff=0.3)
            raise KeyError(f"no layer {layer!r}; did you mean {' or '.join(near) or 'one of graph.layers'}?")
        return weight

    def _dims_of(self, units: Units) -> Iterator[tuple[str, int]]:
        """Yield each tensor and dimension that one of the units is bound to."""
        for name, dims in self.bindings.items():
            for dim, dim_units in dims.items():
                if np.isin(dim_units, units).any():
                    yield name, dim
