"""NEW."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_prune.graph.channel_graph import ChannelGraph, module_of
from lightning_prune.selection.layer_patterns import containers, holders


@dataclass(frozen=True)
class DenseSizes:
    """What the network had before the first cut, so that limits and budgets keep their meaning after it.

    Attributes:
        costs: resource -> cost of the whole dense network.
        params: qualified name of a layer or block -> its dense parameters.
        channels: qualified name of a layer or block -> its dense filters.

    Example:
        >>> DenseSizes.of(ChannelGraph(0, {}, {}, {}, {}, {"macs": []}))
        DenseSizes(costs={'macs': 0}, params={}, channels={})
    """

    costs: Mapping[str, int]
    params: Mapping[str, int]
    channels: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ChannelGraph) -> DenseSizes:
        """The sizes of a network that has not been cut."""
        kept = graph.kept()
        costs = {resource: model.total(kept) for resource, model in graph.cost_models.items()}
        return cls(costs, sizes_by_module(graph, params_of(graph)), sizes_by_module(graph, filters_of(graph)))

    def shares(self, graph: ChannelGraph) -> dict[str, float]:
        """Resource -> what remains of its dense cost in the smaller network of ``graph``."""
        return {name: graph.cost(name) / max(self.costs[name], 1) for name in graph.cost_models}

    def completed(self, graph: ChannelGraph, shapes: Mapping[str, Sequence[int]]) -> DenseSizes:
        """These sizes, with the channels of checkpoints that hold none, by the ``shapes`` of what was cut.

        Raises:
            ValueError: the graph counts a resource that was not counted before the first cut.
        """
        for resource in graph.cost_models.keys() - self.costs.keys():
            raise ValueError(
                f"what the dense network cost in {resource!r} is not known: the network was cut before that resource "
                "was given. Go on without it, or begin with the dense network"
            )
        now = filters_of(graph)
        dense = {name: shapes[name][graph.filter_dims[name]] if name in shapes else now[name] for name in now}
        return self if self.channels else replace(self, channels=sizes_by_module(graph, dense))

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain numbers, fit for a checkpoint or JSON."""
        return {"costs": dict(self.costs), "params": dict(self.params), "channels": dict(self.channels)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DenseSizes:
        """The inverse of :meth:`to_dict`; of older ones too, which hold no channels."""
        return cls(dict(state["costs"]), dict(state["params"]), dict(state.get("channels", {})))


def params_of(graph: ChannelGraph) -> dict[str, int]:
    """Number of elements of each parameter."""
    sizes: Counter[str] = Counter()
    for term in graph.terms.get("params", ()):
        sizes[term.layer] += term.cost([len(factor) for factor in term.factors])
    return sizes


def filters_of(graph: ChannelGraph) -> dict[str, int]:
    """Number of filters of each weight."""
    return {name: len(units) for name, units in graph.layers.items()}


def sizes_by_module(graph: ChannelGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of parameters, summed for each layer and each block; those of norms count for their block."""
    found: Counter[str] = Counter()
    layers = {module_of(name) for name in graph.layers}
    blocks = containers(graph.layers)
    for name, size in sizes.items():
        found.update(dict.fromkeys(holders(name, layers, blocks), size))
    return dict(found)
