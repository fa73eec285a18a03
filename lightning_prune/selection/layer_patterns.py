"""Match names and globs with layers, blocks and types of modules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_tree import module_of

__all__ = [
    "aliases_of",
    "check_patterns",
    "class_distance",
    "excluded_layers",
    "matches_layer",
    "names_and_containers",
    "pattern_targets",
]


def names_and_containers(parameters: Iterable[str]) -> list[str]:
    """Return every name that a pattern may match: parameters, their modules, and the modules that hold those.

    Example:
        >>> names_and_containers(["up.conv.weight", "up.conv.bias"])
        ['up', 'up.conv', 'up.conv.weight', 'up.conv.bias']
    """
    return list(dict.fromkeys(prefix for name in parameters for prefix in _prefixes(name)))


def pattern_targets(graph: ChannelGraph) -> list[str]:
    """Return every name of a network's layers, also of those that have vanished, that a pattern may match."""
    return names_and_containers([*graph.layers, *graph.gone])


def check_patterns(patterns: Iterable[str], targets: Sequence[str], argument: str) -> None:
    """Raise ValueError for a name or glob that matches none of ``targets``; suggest the nearest names."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in targets):
            near = get_close_matches(pattern, targets, n=3, cutoff=0.5) or list(targets)[:3]
            raise ValueError(
                f"{argument} {pattern!r} matches no layer; did you mean {' or '.join(map(repr, near))}?"
            )


def excluded_layers(graph: ChannelGraph, exclude: Sequence[str]) -> set[str]:
    """Return the layers that ``exclude`` matches: names or globs of weights, layers, or modules that hold them.

    Raises:
        ValueError: a pattern matches no layer.
    """
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    check_patterns(patterns, pattern_targets(graph), "exclude")
    return {layer for layer in graph.layers if any(matches_layer(pattern, layer) for pattern in patterns)}


def matches_layer(pattern: str, parameter: str) -> bool:
    """Return whether a name or glob matches a parameter, its module, or any module that holds it.

    Example:
        >>> matches_layer("decoder.*", "decoder.up.weight"), matches_layer("up", "decoder.up.weight")
        (True, False)
    """
    return any(fnmatchcase(prefix, pattern) for prefix in _prefixes(parameter))


def class_distance(module_type: type, target: str | type) -> int | None:
    """Return how many base classes lie between a class and ``target``: 0 if it is ``target``, None if no subclass.

    Example:
        >>> from torch import nn
        >>> distances = [class_distance(nn.Conv2d, name) for name in ("Conv2d", "torch.nn.Conv2d", nn.Module)]
        >>> distances, class_distance(nn.Conv2d, "torch.nn.Linear") is None
        ([0, 0, 2], True)
    """
    for distance, base in enumerate(module_type.__mro__[:-1]):
        if base is target or (isinstance(target, str) and _has_name(base, target)):
            return distance
    return None


def _has_name(module_type: type, name: str) -> bool:
    """Return whether a class has this name, alone or after the module that defines or exports it."""
    if name in (module_type.__name__, f"{module_type.__module__}.{module_type.__qualname__}"):
        return True
    module, _, last = name.rpartition(".")
    return last == module_type.__name__ and getattr(sys.modules.get(module), last, None) is module_type


def aliases_of(graph: ChannelGraph) -> dict[str, list[str]]:
    """Return each layer's other names: its weights, and the containers that hold only this layer.

    Example:
        >>> import numpy as np
        >>> layers = dict.fromkeys(["up.conv.weight", "out.weight"], np.arange(2))
        >>> aliases_of(ChannelGraph(2, {}, layers, {}, {}, {}))
        {'up.conv': ['up.conv.weight', 'up'], 'out': ['out.weight']}
    """
    aliases: dict[str, list[str]] = {}
    for weight in graph.layers:
        aliases.setdefault(module_of(weight), []).append(weight)
    layers_inside = Counter(container for module in aliases for container in _containers_above(module))
    for module, names in aliases.items():
        names += [c for c in _containers_above(module) if layers_inside[c] == 1 and c not in aliases]
    return aliases


def _prefixes(name: str) -> list[str]:
    """Return a dotted name and the names of all modules that hold it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _containers_above(module: str) -> list[str]:
    """Return the modules that hold a module, the outermost first."""
    return _prefixes(module)[:-1]
