"""Coupled blocks: parts of a network that are pruned on their own, each one or several groups of coupled layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np
from scipy.sparse.csgraph import connected_components

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.selection.incremental_cost import layer_incidence
from lightning_prune.selection.layer_patterns import (
    check_patterns,
    excluded_layers,
    matches_layer,
    pattern_targets,
)
from lightning_prune.tracing.ids import Units

__all__ = ["CoupledBlock", "find_blocks"]


@dataclass(frozen=True)
class CoupledBlock:
    """Layers whose filters are pruned together, while the rest of the network keeps its filters.

    Attributes:
        name: the pattern that the user gave for the block; otherwise the module that holds the layers, or the module
            of the first layer.
        layers: names of weights in ``graph.layers``, in the order of the forward.
    """

    name: str
    layers: tuple[str, ...]

    def units(self, graph: ChannelGraph) -> Units:
        """Return the units of the block that may be removed, sorted, as ``graph`` numbers them."""
        filters = np.concatenate([graph.layers[layer] for layer in self.layers])
        return np.intersect1d(filters, graph.prunable)


def find_blocks(
    graph: ChannelGraph, blocks: int | Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[CoupledBlock]:
    """Split a network into blocks. Each layer is in one block, together with all layers it is coupled with.

    Args:
        graph: of the network.
        blocks: ``None``: each group of coupled layers is a block, as in the NetAdapt paper. A number: the largest
            number of blocks; neighbouring groups are joined until it is reached, first those with the innermost
            common module, and among these the cheapest. Names or globs of layers, or of modules that hold them:
            each makes one block; a layer that none of them matches keeps its filters, and a layer that several
            match belongs to the first.
        exclude: names or globs of layers that keep their filters.

    Raises:
        ValueError: a name matches no layer, or only layers that may not be pruned; or fewer than one block.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3) for _ in range(4)))
        >>> graph = trace(net, torch.zeros(1, 4, 16, 16))
        >>> [block.name for block in find_blocks(graph)], [block.layers for block in find_blocks(graph, ["1"])]
        (['0', '1', '2'], [('1.weight',)])
    """
    groups = _coupled_groups(graph, excluded_layers(graph, exclude))
    if blocks is None:
        return _named_blocks([[group] for group in groups])
    if isinstance(blocks, int):
        return _named_blocks(_join_neighbours(graph, groups, blocks))
    return _blocks_by_pattern(graph, groups, [blocks] if isinstance(blocks, str) else list(blocks))


def _coupled_groups(graph: ChannelGraph, excluded: set[str]) -> list[list[str]]:
    """Return the groups of layers that share units, in the order of the forward, if any of their units may go."""
    incidence = layer_incidence(graph)
    _, labels = connected_components(incidence @ incidence.T, directed=False)
    groups: dict[int, list[str]] = {}
    for layer, label in zip(graph.layers, labels.tolist(), strict=True):
        groups.setdefault(label, []).append(layer)
    kept = [graph.layers[layer] for layer in sorted(excluded)]
    free = np.setdiff1d(graph.prunable, np.concatenate([*kept, np.empty(0, np.int64)]))
    return [group for group in groups.values() if any(np.isin(graph.layers[w], free).any() for w in group)]


def _join_neighbours(graph: ChannelGraph, groups: list[list[str]], number: int) -> list[list[list[str]]]:
    """Join neighbouring groups until there are at most ``number`` blocks."""
    if number < 1:
        raise ValueError(f"need at least 1 block, got {number}")
    blocks = [[group] for group in groups]
    costs = [_removable_cost(graph, group) for group in groups]
    while len(blocks) > number:
        depths = [len(_common_module(_flatten(a + b))) for a, b in pairwise(blocks)]
        at = min(range(len(depths)), key=lambda i: (-depths[i], costs[i] + costs[i + 1], i))
        blocks[at : at + 2] = [blocks[at] + blocks[at + 1]]
        costs[at : at + 2] = [costs[at] + costs[at + 1]]
    return blocks


def _blocks_by_pattern(
    graph: ChannelGraph, groups: list[list[str]], patterns: list[str]
) -> list[CoupledBlock]:
    """Return one block per pattern; a group that several patterns match belongs to the first."""
    if not patterns:
        raise ValueError("blocks names no block: name some, or give None for each group of coupled layers")
    check_patterns(patterns, pattern_targets(graph), "block")
    remaining, blocks = list(groups), []
    for pattern in patterns:
        matches = [group for group in remaining if any(matches_layer(pattern, layer) for layer in group)]
        if not matches:
            raise ValueError(
                f"block {pattern!r} holds no layer that can be pruned: its filters must stay, or they belong to a "
                "block that was named before"
            )
        remaining = [group for group in remaining if group not in matches]
        blocks.append(CoupledBlock(pattern, tuple(_flatten(matches))))
    return blocks


def _named_blocks(blocks: Iterable[list[list[str]]]) -> list[CoupledBlock]:
    """Name each block after the module that holds it; where several blocks share one, after the first layer."""
    block_layers = [tuple(_flatten(block)) for block in blocks]
    modules = [".".join(_common_module(layers)) for layers in block_layers]
    return [
        CoupledBlock(module if module and modules.count(module) == 1 else module_of(layers[0]), layers)
        for module, layers in zip(modules, block_layers, strict=True)
    ]


def _flatten(groups: Iterable[list[str]]) -> list[str]:
    return [layer for group in groups for layer in group]


def _common_module(layers: Sequence[str]) -> list[str]:
    """Return the innermost module that holds all of the layers, as the parts of its name."""
    levels = zip(*(module_of(layer).split(".") for layer in layers), strict=False)
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]


def _removable_cost(graph: ChannelGraph, group: Sequence[str]) -> int:
    """Return what the network saves, in its first resource, if the whole group is removed."""
    units = CoupledBlock("", tuple(group)).units(graph)
    resource = next(iter(graph.cost_models))
    return graph.cost(resource) - graph.cost(resource, units)
