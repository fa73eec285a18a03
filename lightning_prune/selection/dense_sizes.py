"""Sizes of the dense network, to which budgets and limits refer after the first cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_prune.graph.channel_graph import ChannelGraph


@dataclass(frozen=True)
class DenseSizes:
    """Sizes of the network before the first cut, so that limits and budgets keep their meaning after it.

    Attributes:
        costs: resource -> cost of the whole dense network.
        params: qualified name of a layer or block -> number of its parameters when dense.
        channels: qualified name of a layer or block -> number of its filters when dense.

    Example:
        >>> DenseSizes.of(ChannelGraph(0, {}, {}, {}, {}, {"macs": []}))
        DenseSizes(costs={'macs': 0}, params={}, channels={})
    """

    costs: Mapping[str, int]
    params: Mapping[str, int]
    channels: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ChannelGraph) -> DenseSizes:
        """Return the sizes of a network that has not been cut yet."""
        kept = graph.kept()
        costs = {resource: model.total(kept) for resource, model in graph.cost_models.items()}
        return cls(costs, sizes_by_module(graph, params_of(graph)), sizes_by_module(graph, filters_of(graph)))

    def shares(self, graph: ChannelGraph) -> dict[str, float]:
        """Return, for each resource, the cost of the smaller network of ``graph`` as a share of the dense cost."""
        return {name: graph.cost(name) / max(self.costs[name], 1) for name in graph.cost_models}

    def completed(self, graph: ChannelGraph, shapes: Mapping[str, Sequence[int]]) -> DenseSizes:
        """Return these sizes with ``channels`` filled in, which old checkpoints lack.

        Args:
            graph: of the network after some cuts.
            shapes: name of each tensor that was cut -> its dense shape.

        Raises:
            ValueError: the graph has a resource that was not measured before the first cut.
        """
        for resource in graph.cost_models.keys() - self.costs.keys():
            raise ValueError(
                f"the cost of the dense network in {resource!r} is unknown: the network was cut before this resource "
                "was added. Continue without it, or start from the dense network"
            )
        now = filters_of(graph)
        dense = {name: shapes[name][graph.filter_dims[name]] if name in shapes else now[name] for name in now}
        return self if self.channels else replace(self, channels=sizes_by_module(graph, dense))

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return plain numbers, for a checkpoint or JSON."""
        return {"costs": dict(self.costs), "params": dict(self.params), "channels": dict(self.channels)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DenseSizes:
        """Restore what :meth:`to_dict` returned, also in its older form without channels."""
        return cls(dict(state["costs"]), dict(state["params"]), dict(state.get("channels", {})))


def params_of(graph: ChannelGraph) -> dict[str, int]:
    """Return the number of elements of each parameter."""
    sizes: Counter[str] = Counter()
    for term in graph.terms.get("params", ()):
        sizes[term.layer] += term.cost([len(factor) for factor in term.factors])
    return sizes


def filters_of(graph: ChannelGraph) -> dict[str, int]:
    """Return the number of filters of each weight."""
    return {name: len(units) for name, units in graph.layers.items()}


def sizes_by_module(graph: ChannelGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sum sizes of parameters over each layer and each block; those of norms belong to their block only."""
    totals: Counter[str] = Counter()
    for name, size in sizes.items():
        totals.update(dict.fromkeys(graph.layer_tree.owners(name), size))
    return dict(totals)
