"""How much of a network may go: limits per layer and block, the dense sizes they mean (level 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.layer_patterns import aliases_of, containers, is_kind

__all__ = ["Limit", "Limits", "limited"]


Of = Literal["params", "channels"]
#: in ``overrides``: a share, of what ``Limits.of`` says, or that and of what
Given = float | Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """How much of one layer or block may go.

    Attributes:
        share: in [0, 1].
        of: of its parameters, or of its channels (filters).
        source: the argument of :class:`Limits` that says so, for messages.
    """

    share: float
    of: Of = "params"
    source: str = ""

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 <= self.share <= 1:
            raise ValueError(f"the limit {self.source} must be a share in [0, 1], got {self.share!r}")
        if self.of not in get_args(Of):
            raise ValueError(
                f"the limit {self.source} must be of {' or '.join(get_args(Of))}, got {self.of!r}"
            )

    def __str__(self) -> str:
        return f"{self.share:.0%} of its {'parameters' if self.of == 'params' else 'channels'} may go"


@dataclass(frozen=True)
class Limits:
    """How much of the dense parameters, or channels, of a layer or block may go, as a share (origins A, 'Limits').

    A layer is *closed*, and loses no further filter, once the next one would take it over its limit. Of its
    parameters, what it loses because its inputs go counts. With ``strict`` a filter also stays if its loss as an
    *input* would take another layer over that layer's limit, so that no layer ever exceeds it; then 75 %
    everywhere can never reach less than a quarter of the MACs.

    Args:
        layers: for every layer without a better match.
        blocks: for every container that holds several layers; ``None``: only those that ``overrides`` mean.
        overrides: what is meant -> its limit: a share, or ``{"share": 0.5, "of": "channels"}``. Meant are layers and
            blocks, by qualified name or glob, or by type: a class, or its name with or without its module
            (``"torch.nn.Linear"``, ``"BasicBlock"``); subclasses, too. Names go before types; of several names the
            longest wins, of several types the nearest to the module's own.
        strict: see above.
        of: what shares are of, where an override says nothing else: ``"params"`` or ``"channels"``.

    Raises:
        ValueError: a limit is outside [0, 1], or of neither; ``strict`` where no limit is of parameters.

    Example:
        >>> limits = Limits(overrides={"decoder.*": 0.9, "decoder.head": 0})
        >>> [limits.of_layer(name).share for name in ("decoder.head", "decoder.up", "encoder")]
        [0, 0.9, 0.75]
        >>> from torch import nn
        >>> Limits(overrides={"torch.nn.Linear": {"share": 0.5, "of": "channels"}}).of_layer("head", nn.Linear).of
        'channels'
    """

    layers: float = 0.75
    blocks: float | None = None
    overrides: Mapping[str | type, Given] = field(default_factory=dict)
    strict: bool = False
    of: Of = "params"

    def __post_init__(self) -> None:
        limits = [Limit(self.layers, self.of, f"layers={self.layers}"), *map(self._given, self.overrides)]
        if self.blocks is not None:
            limits.append(Limit(self.blocks, self.of, f"blocks={self.blocks}"))
        if self.strict and not any(limit.of == "params" for limit in limits):
            raise ValueError(
                "strict is about parameters that a layer loses with its inputs; no limit is of parameters"
            )

    def of_layer(self, module: str, kind: type | None = None, aliases: Sequence[str] = ()) -> Limit:
        """How much of the layer ``module``, of the class ``kind``, may go; ``aliases`` are other names of it."""
        return self._override(module, kind, aliases) or Limit(self.layers, self.of, f"layers={self.layers}")

    def of_block(self, module: str, kind: type | None = None) -> Limit | None:
        """How much of the container ``module`` may go, or None if it has no limit."""
        default = None if self.blocks is None else Limit(self.blocks, self.of, f"blocks={self.blocks}")
        return self._override(module, kind) or default

    def _override(self, module: str, kind: type | None, aliases: Sequence[str] = ()) -> Limit | None:
        meant = [key for key in self.overrides if any(_named(key, name) for name in (module, *aliases))]
        if meant:
            return self._given(max(meant, key=lambda key: len(str(key))))
        near = [(is_kind(kind, key), -len(str(key)), key) for key in self.overrides] if kind else []
        kinds = [(distance, length, str(key), key) for distance, length, key in near if distance is not None]
        return self._given(min(kinds)[-1]) if kinds else None

    def _given(self, key: str | type) -> Limit:
        given = self.overrides[key]
        source = f"overrides[{key if isinstance(key, str) else key.__name__!r}]={given}"
        if not isinstance(given, Mapping):
            return Limit(given, self.of, source)
        if "share" not in given or not given.keys() <= {"share", "of"}:
            raise ValueError(f"the limit {source} must have a 'share' and may have an 'of', nothing else")
        return Limit(given["share"], given.get("of", self.of), source)


def _named(key: str | type, name: str) -> bool:
    return isinstance(key, str) and fnmatchcase(name, key)


def limited(graph: ChannelGraph, limits: Limits) -> dict[str, Limit]:
    """Every layer and block that loses only a part, by name, and what that is.

    Raises:
        ValueError: an override means no layer and no block.
    """
    blocks, aliases = containers(graph.layers), aliases_of(graph)
    known = {**dict.fromkeys(blocks, ()), **aliases}
    for key in limits.overrides:
        _check_meant(key, graph, known)
    found = {name: limits.of_block(name, graph.types.get(name)) for name in blocks}
    found |= {name: limits.of_layer(name, graph.types.get(name), also) for name, also in aliases.items()}
    return {name: limit for name, limit in found.items() if limit is not None and limit.share < 1}


def _check_meant(key: str | type, graph: ChannelGraph, known: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for an override that means nothing; suggest the nearest names and types."""
    everything = [*known, *(name for also in known.values() for name in also)]
    kinds = {graph.types[name] for name in known if name in graph.types}
    if any(_named(key, name) for name in everything) or any(is_kind(kind, key) is not None for kind in kinds):
        return
    called = key if isinstance(key, str) else key.__name__
    choices = [*everything, *sorted({kind.__name__ for kind in kinds})]
    near = get_close_matches(called, choices, n=3, cutoff=0.5) or choices[:3]
    raise ValueError(
        f"limit {called!r} matches no layer or block, and no type of one; did you mean "
        f"{' or '.join(map(repr, near))}?"
    )
