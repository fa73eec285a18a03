"""What names mean: layers, the blocks that hold them, patterns, types (level 3)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from lightning_prune.graph.channel_graph import ChannelGraph, module_of

__all__ = [
    "aliases_of",
    "check_patterns",
    "containers",
    "excluded_layers",
    "holders",
    "is_kind",
    "means",
    "module_of",
    "names",
    "prefixes",
]


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


def is_kind(kind: type, wanted: str | type) -> int | None:
    """How far ``kind`` is from the class that is meant, 0 for that class itself; None if it is none of it.

    Example:
        >>> from torch import nn
        >>> is_kind(nn.Conv2d, "Conv2d"), is_kind(nn.Conv2d, "torch.nn.Conv2d"), is_kind(nn.Conv2d, nn.Module)
        (0, 0, 2)
        >>> is_kind(nn.Conv2d, "torch.nn.Linear") is None
        True
    """
    for distance, base in enumerate(kind.__mro__[:-1]):
        if base is wanted or (isinstance(wanted, str) and _is_called(base, wanted)):
            return distance
    return None


def _is_called(kind: type, name: str) -> bool:
    """Whether a class goes by this name, alone or with the module that it lives in or is exported from."""
    if name in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}"):
        return True
    module, _, last = name.rpartition(".")
    return last == kind.__name__ and getattr(sys.modules.get(module), last, None) is kind


def aliases_of(graph: ChannelGraph) -> dict[str, list[str]]:
    """Layer -> its weights, and the containers that hold nothing else: what else its name may be.

    Example:
        >>> import numpy as np
        >>> layers = dict.fromkeys(["up.conv.weight", "out.weight"], np.arange(2))
        >>> aliases_of(ChannelGraph(2, {}, layers, {}, {}, {}))
        {'up.conv': ['up.conv.weight', 'up'], 'out': ['out.weight']}
    """
    found: dict[str, list[str]] = {}
    for weight in graph.layers:
        found.setdefault(module_of(weight), []).append(weight)
    held = Counter(above for module in found for above in _above(module))
    for module, also in found.items():
        also += [above for above in _above(module) if held[above] == 1 and above not in found]
    return found


def _above(module: str) -> list[str]:
    """The containers of a module, the outermost first."""
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def holders(term_layer: str, layers: Iterable[str], blocks: Iterable[str]) -> list[str]:
    """The layer (if any) and the blocks that a term belongs to; terms name a parameter or its module."""
    own = [name for name in (term_layer, module_of(term_layer)) if name in layers][:1]
    parts = term_layer.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return own + [name for name in above if name in blocks and name not in own]
