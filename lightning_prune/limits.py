"""How much of a network may go: names, limits per layer and block, the dense sizes they mean (level 3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from lightning_prune.graph import ChannelGraph

__all__ = ["DenseSizes", "Limits", "containers", "excluded_layers", "module_of"]


def module_of(weight: str) -> str:
    """The module that owns a parameter.

    Example:
        >>> module_of("encoder.conv1.weight")
        'encoder.conv1'
    """
    return weight.rpartition(".")[0] or weight


def containers(layers: Iterable[str]) -> dict[str, list[str]]:
    """Blocks: every module that holds several layers -> their weights.

    Example:
        >>> containers(["a.conv1.weight", "a.conv2.weight", "b.conv.weight"])
        {'a': ['a.conv1.weight', 'a.conv2.weight']}
    """
    inside: dict[str, list[str]] = {}
    for layer in layers:
        parts = module_of(layer).split(".")
        for depth in range(1, len(parts)):
            inside.setdefault(".".join(parts[:depth]), []).append(layer)
    return {name: held for name, held in inside.items() if len(held) > 1}


def prefixes(parameters: Iterable[str]) -> list[str]:
    """Every name that a pattern may mean: parameters, their modules, and the modules that hold those."""
    found: dict[str, None] = {}
    for name in parameters:
        parts = name.split(".")
        found.update(dict.fromkeys(".".join(parts[: depth + 1]) for depth in range(len(parts))))
    return list(found)


def names(graph: ChannelGraph) -> list[str]:
    """Every name that a pattern may mean in a network."""
    return prefixes(graph.layers)


def check_patterns(patterns: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError for a name or glob that matches nothing; suggest the nearest names."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = get_close_matches(pattern, known, n=3, cutoff=0.5) or list(known)[:3]
            raise ValueError(
                f"{what} {pattern!r} matches no layer; did you mean {' or '.join(map(repr, near))}?"
            )


def excluded_layers(graph: ChannelGraph, exclude: Sequence[str]) -> set[str]:
    """The layers that ``exclude`` means: a name or glob of a weight, a layer, or anything that holds it.

    Raises:
        ValueError: a pattern matches nothing.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    check_patterns(patterns, names(graph), "exclude")
    return {layer for layer in graph.layers if any(means(pattern, layer) for pattern in patterns)}


def means(pattern: str, layer: str) -> bool:
    """Whether a name or glob means a parameter, its module, or anything that holds it."""
    parts = layer.split(".")
    return any(fnmatchcase(".".join(parts[: depth + 1]), pattern) for depth in range(len(parts)))


@dataclass(frozen=True)
class Limits:
    """How much of the dense parameters of a layer or block may go, as a share (origins A, 'Limits').

    A layer is *closed*, and loses no further filter, once the next one would take it over its limit. What it
    loses because its inputs go counts. With ``strict`` a filter also stays if its loss as an *input* would
    take another layer over that layer's limit, so that no layer ever exceeds it; then 75 % everywhere can
    never reach less than a quarter of the MACs.

    Args:
        layers: for every layer without a better match.
        blocks: for every container that holds several layers; ``None``: only those named in ``overrides``.
        overrides: qualified name or glob of a layer or block -> its limit. The longest match wins.
        strict: see above.

    Raises:
        ValueError: a limit is outside [0, 1].

    Example:
        >>> limits = Limits(overrides={"decoder.*": 0.9, "decoder.head": 0})
        >>> limits.of_layer("decoder.head"), limits.of_layer("decoder.up"), limits.of_layer("encoder")
        (0, 0.9, 0.75)
    """

    layers: float = 0.75
    blocks: float | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        given: dict[str, float | None] = {"layers": self.layers, "blocks": self.blocks, **self.overrides}
        for name, limit in given.items():
            if limit is not None and not 0 <= limit <= 1:
                raise ValueError(f"the limit of {name!r} must be a share in [0, 1], got {limit}")

    def of_layer(self, module: str) -> float:
        """The share of the layer ``module`` that may go."""
        limit = self._override(module)
        return self.layers if limit is None else limit

    def of_block(self, module: str) -> float | None:
        """The share of the container ``module`` that may go, or None if it has no limit."""
        limit = self._override(module)
        return self.blocks if limit is None else limit

    def _override(self, module: str) -> float | None:
        matches = [pattern for pattern in self.overrides if fnmatchcase(module, pattern)]
        return self.overrides[max(matches, key=len)] if matches else None


@dataclass(frozen=True)
class DenseSizes:
    """What the network had before the first cut, so that limits and budgets keep their meaning after it.

    Attributes:
        costs: resource -> cost of the whole dense network.
        params: qualified name of a layer or block -> its dense parameters.

    Example:
        >>> DenseSizes.of(ChannelGraph(0, {}, {}, {}, {}, {"macs": []}))
        DenseSizes(costs={'macs': 0}, params={})
    """

    costs: Mapping[str, int]
    params: Mapping[str, int]

    @classmethod
    def of(cls, graph: ChannelGraph) -> DenseSizes:
        """The sizes of a network that has not been cut."""
        kept = graph.kept()
        costs = {resource: model.total(kept) for resource, model in graph.cost_models.items()}
        return cls(costs, params_by_module(graph))

    def checked(self, graph: ChannelGraph) -> DenseSizes:
        """These sizes; raise ValueError if the graph counts a resource that was not counted before the first cut."""
        for resource in graph.cost_models.keys() - self.costs.keys():
            raise ValueError(
                f"what the dense network cost in {resource!r} is not known: the network was cut before that resource "
                "was given. Go on without it, or begin with the dense network"
            )
        return self

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain numbers, fit for a checkpoint or JSON."""
        return {"costs": dict(self.costs), "params": dict(self.params)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DenseSizes:
        """The inverse of :meth:`to_dict`."""
        return cls(dict(state["costs"]), dict(state["params"]))


def params_by_module(graph: ChannelGraph) -> dict[str, int]:
    """Parameters of each layer and each block, by qualified name; those of norms count for their block."""
    sizes: Counter[str] = Counter()
    layers = {module_of(name) for name in graph.layers}
    blocks = containers(graph.layers)
    for term in graph.terms.get("params", ()):
        size = term.scale * math.prod(len(factor) for factor in term.factors)
        sizes.update(dict.fromkeys(holders(term.layer, layers, blocks), size))
    return dict(sizes)


def holders(term_layer: str, layers: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """The layer (if any) and the blocks that a term belongs to; terms name a parameter or its module."""
    own = [name for name in (term_layer, module_of(term_layer)) if name in layers][:1]
    parts = term_layer.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return own + [name for name in above if name in blocks and name not in own]
