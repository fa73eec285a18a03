"""Places of a network's layers in a picture: left to right the order of the forward, downwards the resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_prune.graph.costs import Term
from lightning_prune.graph.coupling import CoupledLayers, coupled_layers, readers
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.tracing.ids import Units

__all__ = ["Layout", "Node", "blocks_of", "lay_out"]

MOST_LAYERS = 90  # drawn one by one; of larger networks coupled layers are one node
MOST_NODES = 120  # of larger networks, layers that are coupled to none are one node per block
FEW = 6  # a level with less than this part of the most blocks has too few
GAP = 1.0  # rows between levels


@dataclass
class Node:
    """One layer, or several, at one place.

    Attributes:
        name: of the layer or block.
        layers: weights of its layers.
        group: number of the coupled layers, None if there are none.
        x: column.
        y: row, from the top.
        name_above: whether the name stands above, since there are rows of coupled layers below.
    """

    name: str
    layers: tuple[str, ...]
    group: int | None
    x: float = 0.0
    y: float = 0.0
    name_above: bool = False


@dataclass(frozen=True)
class Layout:
    """Nodes and edges of a picture.

    Attributes:
        nodes: in the order of the forward.
        edges: (number of the writer, number of the reader).
        groups: coupled layers, by number.
        levels: name and row of each resolution.
    """

    nodes: Sequence[Node]
    edges: Sequence[tuple[int, int]]
    groups: Sequence[CoupledLayers]
    levels: Sequence[tuple[str, float]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self.nodes)

    @property
    def rows(self) -> float:
        """Lowest row."""
        return max((node.y for node in self.nodes), default=0.0) + 1

    def bands(self) -> Iterator[list[Node]]:
        """Yield the nodes of each group that has several, in order."""
        for number in range(len(self.groups)):
            members = [node for node in self.nodes if node.group == number]
            if len(members) > 1:
                yield members


def lay_out(
    layers: Mapping[str, Units],
    filter_dims: Mapping[str, int],
    bindings: Mapping[str, Mapping[int, Units]],
    terms: Mapping[str, Sequence[Term]],
) -> Layout:
    """Place the layers of a graph; the arguments are its attributes.

    Example:
        >>> import numpy as np
        >>> units = {"a.weight": np.array([0, 1]), "b.weight": np.array([2])}
        >>> bindings = {"a.weight": {0: units["a.weight"]}, "b.weight": {0: units["b.weight"], 1: units["a.weight"]}}
        >>> layout = lay_out(units, dict.fromkeys(units, 0), bindings, {})
        >>> [(node.name, node.x) for node in layout.nodes], layout.edges
        ([('a', 0.0), ('b', 1.0)], [(0, 1)])
    """
    order = _order(layers, terms.get("macs", ()))
    groups = [group for group in coupled_layers(layers) if len(group.layers) > 1]
    group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
    nodes = _nodes(order, groups, group_of)
    for column, node in enumerate(nodes):
        node.x = float(column)
    positions = _positions(order, terms)
    levels = _place(nodes, [positions[node.layers[0]] for node in nodes])
    edges = _edges(nodes, group_of, readers(layers, filter_dims, bindings), positions)
    return Layout(nodes, edges, groups, levels)


def _order(layers: Mapping[str, Units], terms: Sequence[Term]) -> list[str]:
    """Return the layers in the order of the forward; those without MACs where the network holds them."""
    calls: dict[str, int] = {}
    for number, term in enumerate(terms):
        calls.setdefault(term.layer, number)
    place, places = -1, {}
    for name in layers:
        place = calls.get(name, calls.get(module_of(name), place))
        places[name] = place
    return sorted(layers, key=places.__getitem__)


def _nodes(order: Sequence[str], groups: Sequence[CoupledLayers], group_of: Mapping[str, int]) -> list[Node]:
    if len(order) <= MOST_LAYERS:
        return [Node(module_of(name), (name,), group_of.get(name)) for name in order]
    blocks = blocks_of([name for name in order if name not in group_of], max(10, MOST_NODES - len(groups)))
    nodes: dict[object, Node] = {}
    for name in order:
        group = group_of.get(name)
        block = blocks.get(name, module_of(name))
        key = block if group is None else group
        known = nodes.get(key) or Node(block, (), group)
        nodes[key] = Node(known.name, (*known.layers, name), group)
    for node in nodes.values():
        node.name += f" and {len(node.layers) - 1} more" if len(node.layers) > 1 else ""
    return list(nodes.values())


def blocks_of(names: Sequence[str], most: int) -> dict[str, str]:
    """Return the block of each layer: the innermost blocks of which there are no more than ``most``.

    Where a level has more and the next one around it only a few, as in a long row of equal blocks, those that follow
    each other are put together.

    Example:
        >>> blocks_of(["a.0.weight", "a.1.weight", "b.weight"], most=2)
        {'a.0.weight': 'a', 'a.1.weight': 'a', 'b.weight': 'b'}
        >>> list(blocks_of(["0.weight", "1.weight", "2.weight"], most=2).values())
        ['0 to 1', '0 to 1', '2']
        >>> sorted(set(blocks_of([f"row.{n}.conv.weight" for n in range(40)], most=20).values()))[:2]
        ['row.0 to row.1', 'row.10 to row.11']
    """
    modules = {name: module_of(name).split(".") for name in names}
    inner: dict[str, str] = {}
    for level in range(max(map(len, modules.values()), default=1), 0, -1):
        blocks = {name: ".".join(parts[:level]) for name, parts in modules.items()}
        number = len(set(blocks.values()))
        if number <= most:
            return _joined(inner, most) if inner and number < most / FEW else blocks
        inner = blocks
    return _joined(inner, most)


def _joined(blocks: Mapping[str, str], most: int) -> dict[str, str]:
    """Put blocks that follow each other together, such that there are no more than ``most``."""
    order = list(dict.fromkeys(blocks.values()))
    size = math.ceil(len(order) / max(most, 1))
    chunks = [order[start : start + size] for start in range(0, len(order), size or 1)]
    label = {
        name: name if len(chunk) == 1 else f"{chunk[0]} to {chunk[-1]}" for chunk in chunks for name in chunk
    }
    return {name: label[block] for name, block in blocks.items()}


def _positions(order: Sequence[str], terms: Mapping[str, Sequence[Term]]) -> dict[str, int]:
    """Return the number of places at which each layer's weight is applied: its MACs per parameter."""
    macs: dict[str, int] = {}
    for term in terms.get("macs", ()):
        macs.setdefault(term.layer, _dense(term))  # of the first call
    params = {term.layer: _dense(term) for term in terms.get("params", ())}
    found, last = {}, 1
    for name in order:
        if name in macs and params.get(name):
            last = max(1, round(macs[name] / params[name]))
        found[name] = last
    return found


def _dense(term: Term) -> int:
    return term.scale * math.prod(len(factor) for factor in term.factors)


def _place(nodes: Sequence[Node], positions: Sequence[int]) -> list[tuple[str, float]]:
    """Set the rows: a level for each resolution, within it one row for uncoupled layers and more for groups."""
    levels, top = [], 0.0
    for size in sorted(set(positions), reverse=True):
        inside = [node for node, position in zip(nodes, positions, strict=True) if position == size]
        lanes = _lanes(inside)
        has_single = any(node.group is None for node in inside)
        for node in inside:
            node.name_above = node.group is None and bool(lanes)
            node.y = top + (lanes[node.group] + has_single if node.group is not None else 0)
        rows = max(lanes.values(), default=-1) + 1 + has_single
        levels.append((_size(size), top + (rows - 1) / 2))
        top += rows + GAP
    return levels


def _lanes(nodes: Sequence[Node]) -> dict[int | None, int]:
    """Return a row for each group, such that groups in the same row do not overlap."""
    spans: dict[int, list[float]] = {}
    for node in nodes:
        if node.group is not None:
            spans.setdefault(node.group, []).append(node.x)
    ends: list[float] = []
    lanes: dict[int | None, int] = {}
    for group, span in sorted(spans.items(), key=lambda item: item[1][0]):
        lane = next((number for number, end in enumerate(ends) if end < span[0]), len(ends))
        ends[lane : lane + 1] = [span[-1]]
        lanes[group] = lane
    return lanes


def _size(positions: int) -> str:
    """Return a number of positions as text.

    Example:
        >>> _size(1024), _size(197), _size(1)
        ('32 x 32', '197 places', '1 place')
    """
    side = math.isqrt(positions)
    if side * side == positions and side > 1:
        return f"{side} x {side}"
    return f"{positions} place{'s' * (positions != 1)}"


def _edges(
    nodes: Sequence[Node],
    group_of: Mapping[str, int],
    reading: Mapping[str, Sequence[str]],
    positions: Mapping[str, int],
) -> list[tuple[int, int]]:
    """Return the edges, one from each group of coupled writers: which of them is read, their channels do not say.

    It is the last one before the reader with its resolution, to which the others were added, or the last one of all.
    """
    column = {layer: number for number, node in enumerate(nodes) for layer in node.layers}
    writers: dict[tuple[str, object], list[str]] = {}
    for writer, names in reading.items():
        for reader in names:
            writers.setdefault((reader, group_of.get(writer, writer)), []).append(writer)
    edges: dict[tuple[int, int], None] = {}
    for (reader, _), names in writers.items():
        end = column[reader]
        before = [name for name in names if column[name] < end] or names[:1]
        alike = [name for name in before if positions[name] == positions[reader]]
        start = max(column[name] for name in alike or before)
        if start != end:
            edges[start, end] = None
    return list(edges)
