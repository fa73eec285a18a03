"""Graphs and costs of a network from which residual blocks have vanished, without tracing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_prune.graph.block_search import blocks_of
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.modules import within_any

__all__ = ["block_costs", "units_of_block", "vanished_names", "without_blocks"]


def without_blocks(graph: ChannelGraph, names: Sequence[str]) -> ChannelGraph:
    """Return the graph of what is left when residual blocks vanish, with the same numbers of units.

    Units that only these blocks have are in no layer of it, so that nothing can remove them a second time. Pins and
    couplings of all other units stay as they were, even where only a block was the reason for them: the smaller
    network may allow more.

    Args:
        graph: of the whole network.
        names: of the blocks.

    Raises:
        ValueError: there is no such block, or it cannot vanish.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> graph = trace(CifarResNet(depth=8, width=4), torch.zeros(1, 1, 16, 16))
        >>> smaller = without_blocks(graph, ["blocks.0"])
        >>> graph.cost("params") - smaller.cost("params")  # two convolutions, two norms
        304
    """
    if not names:
        return graph
    blocks = blocks_of(graph)
    blocks.check(names)
    return _without(graph, blocks.replacements(names))


def _without(graph: ChannelGraph, vanished: Mapping[str, Mapping[str, Any]]) -> ChannelGraph:
    gone = list(vanished)
    stays = [f"{name}.{what['activation']}" for name, what in vanished.items() if what.get("activation")]

    def remains(name: str) -> bool:
        return not within_any(name, gone) or within_any(name, stays)

    layers = {name: units for name, units in graph.layers.items() if remains(name)}
    present = np.unique(np.concatenate([*layers.values(), np.empty(0, np.int64)]))
    bindings = {name: dims for name, dims in graph.bindings.items() if remains(name)}
    return replace(
        graph,
        layers=layers,
        bindings=bindings,
        filter_dims={name: graph.filter_dims[name] for name in layers},
        terms={r: [term for term in terms if remains(term.layer)] for r, terms in graph.terms.items()},
        multiples=[each for each in graph.multiples if np.isin(each.units[each.units >= 0], present).any()],
        optional=[part for part in graph.optional if np.isin(part, present).any()],
        types={name: kind for name, kind in graph.types.items() if remains(name)},
        gone=graph.gone
        | {name: graph.types.get(module_of(name), object) for name in graph.layers if not remains(name)},
    )


def vanished_names(graph: ChannelGraph, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the modules that go when blocks vanish."""
    return tuple(sorted(blocks_of(graph).replacements(names))) if names else ()


def units_of_block(graph: ChannelGraph, name: str) -> Units:
    """Return the units that have filters in one block only, sorted: its inner channels."""
    smaller = without_blocks(graph, [name])
    everything, rest = (
        np.unique(np.concatenate([*each.layers.values(), np.empty(0, np.int64)])) for each in (graph, smaller)
    )
    return np.setdiff1d(everything, rest)


def block_costs(graph: ChannelGraph) -> dict[str, dict[str, int]]:
    """Return what vanishes with each residual block: name of the block -> resource -> cost.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> block_costs(trace(CifarResNet(depth=8, width=4), torch.zeros(1, 1, 16, 16)))
        {'blocks.0': {'macs': 73728, 'params': 304}}
    """
    whole = {resource: graph.cost(resource) for resource in graph.cost_models}
    return {
        name: {r: cost - smaller.cost(r) for r, cost in whole.items()}
        for name in blocks_of(graph)
        for smaller in (without_blocks(graph, [name]),)
    }
