"""Blocks: parts of a network that are pruned alone, each one or several groups of coupled layers (level 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np
from scipy.sparse.csgraph import connected_components

from lightning_prune.graph.channel_graph import ChannelGraph, module_of
from lightning_prune.selection.incremental_cost import layer_incidence
from lightning_prune.selection.layer_patterns import check_patterns, excluded_layers, means, names
from lightning_prune.tracing.ids import Units

__all__ = ["CoupledBlock", "find_blocks"]


@dataclass(frozen=True)
class CoupledBlock:
    """Layers whose filters are pruned together, while the rest of the network keeps its filters.

    Attributes:
        name: of a block that the user named, that; else of the module that holds the layers, or the first layer's.
        layers: weights in ``graph.layers``, in the order of the forward.
    """

    name: str
    layers: tuple[str, ...]

    def units(self, graph: ChannelGraph) -> Units:
        """Its units that may be removed, sorted, in the network as ``graph`` has it."""
        own = np.concatenate([graph.layers[layer] for layer in self.layers])
        return np.intersect1d(own, graph.prunable)


def find_blocks(
    graph: ChannelGraph, blocks: int | Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> list[CoupledBlock]:
    """Split a network into blocks. A layer is in one block, together with all that it is coupled with.

    Args:
        graph: of the network.
        blocks: ``None``: each group of coupled layers is one, as in the paper. A number: at most so many;
            neighbours are joined until then, those first that lie together in the innermost module, of these
            the cheapest. Names or globs of layers, or of what holds them: each makes one block; what is in none
            of them keeps its filters, what is in several belongs to the first.
        exclude: names or globs of layers whose filters stay.

    Raises:
        ValueError: a name matches no layer, or only such as may not be pruned; or fewer than one block.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 3) for _ in range(4)))
        >>> graph = trace(net, torch.zeros(1, 4, 16, 16))
        >>> [block.name for block in find_blocks(graph)], [block.layers for block in find_blocks(graph, ["1"])]
        (['0', '1', '2'], [('1.weight',)])
    """
    groups = _coupled(graph, excluded_layers(graph, exclude))
    if blocks is None:
        return _named([[group] for group in groups])
    if isinstance(blocks, int):
        return _named(_joined(graph, groups, blocks))
    return _as_told(graph, groups, [blocks] if isinstance(blocks, str) else list(blocks))


def _coupled(graph: ChannelGraph, excluded: set[str]) -> list[list[str]]:
    """Groups of layers that share units, in the order of the forward; without those that may not be pruned."""
    incidence = layer_incidence(graph)
    _, labels = connected_components(incidence @ incidence.T, directed=False)
    groups: dict[int, list[str]] = {}
    for layer, label in zip(graph.layers, labels.tolist(), strict=True):
        groups.setdefault(label, []).append(layer)
    stay = [graph.layers[layer] for layer in sorted(excluded)]
    free = np.setdiff1d(graph.prunable, np.concatenate([*stay, np.empty(0, np.int64)]))
    return [group for group in groups.values() if any(np.isin(graph.layers[w], free).any() for w in group)]


def _joined(graph: ChannelGraph, groups: list[list[str]], number: int) -> list[list[list[str]]]:
    """Neighbours joined until there are at most ``number`` blocks."""
    if number < 1:
        raise ValueError(f"need at least 1 block, got {number}")
    joined = [[group] for group in groups]
    sizes = [_size(graph, group) for group in groups]
    while len(joined) > number:
        depth = [len(_common(_flat(a + b))) for a, b in pairwise(joined)]
        at = min(range(len(depth)), key=lambda i: (-depth[i], sizes[i] + sizes[i + 1], i))
        joined[at : at + 2] = [joined[at] + joined[at + 1]]
        sizes[at : at + 2] = [sizes[at] + sizes[at + 1]]
    return joined


def _as_told(graph: ChannelGraph, groups: list[list[str]], patterns: list[str]) -> list[CoupledBlock]:
    """The blocks that the user named."""
    if not patterns:
        raise ValueError("blocks names no block: name some, or give None for each group of coupled layers")
    check_patterns(patterns, names(graph), "block")
    left, found = list(groups), []
    for pattern in patterns:
        own = [group for group in left if any(means(pattern, layer) for layer in group)]
        if not own:
            raise ValueError(
                f"block {pattern!r} holds nothing of its own to prune: its filters must stay, or belong to a "
                "block that was named before it"
            )
        left = [group for group in left if group not in own]
        found.append(CoupledBlock(pattern, tuple(_flat(own))))
    return found


def _named(blocks: Iterable[list[list[str]]]) -> list[CoupledBlock]:
    """Each block by the module that holds it; by its first layer where that is not only its own."""
    layers = [tuple(_flat(block)) for block in blocks]
    holding = [".".join(_common(held)) for held in layers]
    return [
        CoupledBlock(name if name and holding.count(name) == 1 else module_of(held[0]), held)
        for name, held in zip(holding, layers, strict=True)
    ]


def _flat(groups: Iterable[list[str]]) -> list[str]:
    return [layer for group in groups for layer in group]


def _common(layers: Sequence[str]) -> list[str]:
    """The innermost module that holds all of the layers, as the parts of its name."""
    parts = zip(*(module_of(layer).split(".") for layer in layers), strict=False)
    return [each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts)]


def _size(graph: ChannelGraph, group: Sequence[str]) -> int:
    units = CoupledBlock("", tuple(group)).units(graph)
    resource = next(iter(graph.cost_models))
    return graph.cost(resource) - graph.cost(resource, units)
