"""Limits: how much of each layer and block may be removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.layer_patterns import aliases_of, class_distance, names_and_containers

__all__ = ["Floor", "Limit", "Limits", "active_limits", "channel_floors", "minimum_kept"]

#: what a share refers to
Quantity = Literal["params", "channels"]
#: value in ``overrides``: a share of what ``Limits.of`` names, or a mapping with some of the keys ``OVERRIDE_KEYS``
Override = float | Mapping[str, Any]
OVERRIDE_KEYS = {"share", "of", "min_channels"}
DEFAULT_MIN_CHANNELS = 4


@dataclass(frozen=True)
class Limit:
    """Largest share of one layer or block that may be removed.

    Attributes:
        share: in [0, 1].
        of: whether the share is of its parameters or of its channels (filters).
        source: the argument of :class:`Limits` that this limit comes from, for messages.
    """

    share: float
    of: Quantity = "params"
    source: str = ""

    def __post_init__(self) -> None:
        is_number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not is_number or not 0 <= self.share <= 1:
            raise ValueError(f"the limit {self.source} must be a share in [0, 1], got {self.share!r}")
        if self.of not in get_args(Quantity):
            raise ValueError(
                f"the limit {self.source} must be of {' or '.join(get_args(Quantity))}, got {self.of!r}"
            )

    def __str__(self) -> str:
        return f"{self.share:.0%} of its {'parameters' if self.of == 'params' else 'channels'} may go"


@dataclass(frozen=True)
class Floor:
    """Smallest number of channels that a layer keeps.

    Attributes:
        channels: the number.
        source: the argument of :class:`Limits` that it comes from, for messages.
        is_default: whether it is that of all layers; then a narrow layer keeps a third of its channels instead.

    Raises:
        ValueError: the number is no integer of at least 1.
    """

    channels: int
    source: str = ""
    is_default: bool = True

    def __post_init__(self) -> None:
        is_integer = isinstance(self.channels, int) and not isinstance(self.channels, bool)
        if not is_integer or self.channels < 1:
            raise ValueError(
                f"min_channels must be an integer of at least 1, got {self.channels!r} in {self.source}"
            )

    def of_dense(self, channels: int) -> int:
        """Return the number of channels that a layer keeps which has ``channels`` when dense.

        Example:
            >>> [Floor(4).of_dense(channels) for channels in (64, 8, 7, 3, 1)]
            [4, 3, 3, 1, 1]
            >>> [Floor(4, is_default=False).of_dense(channels) for channels in (8, 3)]
            [4, 3]
        """
        return min(self.channels, math.ceil(channels / 3) if self.is_default else channels)


@dataclass(frozen=True)
class Limits:
    """Largest shares of the dense parameters, or channels, that layers and blocks may lose.

    A layer is *closed*, and loses no more filters, once removing the next one would exceed its limit. Parameters
    that a layer loses because its input channels are removed count as lost. With ``strict``, a filter also stays if
    its removal as an *input* would take another layer over that layer's limit, so that no layer ever exceeds its
    limit; then 75 % everywhere can never reach less than a quarter of the MACs. (Source: origins A, 'Limits'.)

    A layer also keeps at least ``min_channels`` channels, or a third of its channels if it has fewer than three times
    as many when dense. Narrow layers often cost the most per channel, so that a global ranking removes nearly all of
    their channels, and the network can no longer separate some classes, whatever the training that follows. Branches
    that may vanish as a whole have no such floor.

    Args:
        layers: share for every layer without an override.
        blocks: share for every container that holds several layers; ``None``: only those that ``overrides`` match.
        overrides: pattern -> its limit: a share, or ``{"share": 0.5, "of": "channels", "min_channels": 8}``,
            where a key that is left out has its default. A pattern is the qualified name of a layer or block,
            a glob, or a type: a class, or the name of a class with or without its module (``"torch.nn.Linear"``,
            ``"BasicBlock"``); subclasses match too. Names take precedence over types; of several names the longest
            is used, of several types the nearest to the module's own type.
        strict: see above.
        of: quantity that shares refer to, unless an override says otherwise: ``"params"`` or ``"channels"``.
        min_channels: channels that a layer keeps at least; 1: no floor. In ``overrides`` the number holds for narrow
            layers too: a layer with fewer channels keeps all.

    Raises:
        ValueError: a limit is outside [0, 1] or of an unknown quantity; ``min_channels`` is below 1; ``strict``
            where no limit is of parameters.

    Example:
        >>> limits = Limits(overrides={"decoder.*": 0.9, "decoder.head": 0})
        >>> [limits.of_layer(name).share for name in ("decoder.head", "decoder.up", "encoder")]
        [0, 0.9, 0.75]
        >>> from torch import nn
        >>> Limits(overrides={"torch.nn.Linear": {"share": 0.5, "of": "channels"}}).of_layer("head", nn.Linear).of
        'channels'
        >>> Limits(min_channels=8, overrides={"head": {"min_channels": 2}}).floor_of("head").channels
        2
    """

    layers: float = 0.75
    blocks: float | None = None
    overrides: Mapping[str | type, Override] = field(default_factory=dict)
    strict: bool = False
    of: Quantity = "params"
    min_channels: int = DEFAULT_MIN_CHANNELS

    def __post_init__(self) -> None:
        limits = [self._layer_default(), *(self._limit_of_override(key) for key in self.overrides)]
        if (block_default := self._block_default()) is not None:
            limits.append(block_default)
        for key in (None, *self.overrides):
            self._floor(key)
        if self.strict and not any(limit.of == "params" for limit in limits):
            raise ValueError(
                "strict=True concerns parameters that a layer loses with its inputs, but no limit is of parameters: "
                "set strict=False, or give a limit of 'params'"
            )

    def of_layer(self, module: str, module_type: type | None = None, aliases: Sequence[str] = ()) -> Limit:
        """Return the limit of the layer ``module`` of class ``module_type``; ``aliases`` are its other names."""
        key = self._override(module, module_type, aliases)
        return self._layer_default() if key is None else self._limit_of_override(key)

    def of_block(self, module: str, module_type: type | None = None) -> Limit | None:
        """Return the limit of the container ``module``, or None if it has no limit."""
        key = self._override(module, module_type)
        if key is None or _entries(self.overrides[key]).keys() == {"min_channels"}:
            return self._block_default()
        return self._limit_of_override(key)

    def floor_of(self, module: str, module_type: type | None = None, aliases: Sequence[str] = ()) -> Floor:
        """Return the floor of the layer ``module`` of class ``module_type``; ``aliases`` are its other names."""
        return self._floor(self._override(module, module_type, aliases))

    def _layer_default(self) -> Limit:
        return Limit(self.layers, self.of, f"layers={self.layers}")

    def _block_default(self) -> Limit | None:
        return None if self.blocks is None else Limit(self.blocks, self.of, f"blocks={self.blocks}")

    def _override(
        self, module: str, module_type: type | None, aliases: Sequence[str] = ()
    ) -> str | type | None:
        """Return the most specific key of the overrides that matches, or None."""
        names = [
            key for key in self.overrides if any(_matches_name(key, name) for name in (module, *aliases))
        ]
        if names:
            return max(names, key=lambda key: len(str(key)))
        if module_type is None:
            return None
        distances = [(class_distance(module_type, key), key) for key in self.overrides]
        # The nearest type first; of equally near types the longest name, then the first in the alphabet.
        types = [
            (distance, -len(str(key)), str(key), key) for distance, key in distances if distance is not None
        ]
        return min(types)[-1] if types else None

    def _limit_of_override(self, key: str | type) -> Limit:
        entries, source = _entries(self.overrides[key]), self._source(key)
        if not entries.keys() & {"share", "min_channels"} or not entries.keys() <= OVERRIDE_KEYS:
            raise ValueError(
                f"the limit {source} must have a 'share' or 'min_channels', and may have an 'of', nothing else"
            )
        return Limit(entries.get("share", self.layers), entries.get("of", self.of), source)

    def _floor(self, key: str | type | None) -> Floor:
        entries = {} if key is None else _entries(self.overrides[key])
        if key is None or "min_channels" not in entries:
            return Floor(self.min_channels, f"min_channels={self.min_channels}")
        return Floor(entries["min_channels"], self._source(key), is_default=False)

    def _source(self, key: str | type) -> str:
        return f"overrides[{key if isinstance(key, str) else key.__name__!r}]={self.overrides[key]}"


def _entries(override: Override) -> Mapping[str, Any]:
    return override if isinstance(override, Mapping) else {"share": override}


def _matches_name(key: str | type, name: str) -> bool:
    return isinstance(key, str) and fnmatchcase(name, key)


def active_limits(graph: ChannelGraph, limits: Limits) -> dict[str, Limit]:
    """Return the limit of every layer and block, by name, without those that may be removed as a whole.

    Raises:
        ValueError: an override matches no layer and no block.
    """
    blocks, aliases = graph.layer_tree.blocks, aliases_of(graph)
    targets = {**dict.fromkeys(blocks, ()), **aliases}
    for key in limits.overrides:
        _check_override(key, graph, targets)
    by_name = {name: limits.of_block(name, graph.types.get(name)) for name in blocks}
    by_name |= {
        name: limits.of_layer(name, graph.types.get(name), others) for name, others in aliases.items()
    }
    return {name: limit for name, limit in by_name.items() if limit is not None and limit.share < 1}


def channel_floors(graph: ChannelGraph, limits: Limits) -> dict[str, Floor]:
    """Return the floor of every layer, by name, without those of one channel.

    Raises:
        ValueError: an override with ``min_channels`` matches no layer.
    """
    aliases = aliases_of(graph)
    for key, override in limits.overrides.items():
        if "min_channels" in _entries(override):
            _check_override(key, graph, aliases, "min_channels concerns layers, and ")
    by_name = {name: limits.floor_of(name, graph.types.get(name), others) for name, others in aliases.items()}
    return {name: floor for name, floor in by_name.items() if floor.channels > 1}


def _check_override(
    key: str | type, graph: ChannelGraph, targets: Mapping[str, Sequence[str]], context: str = ""
) -> None:
    """Raise ValueError for an override that matches none of ``targets``; suggest the nearest names and types."""
    names = [*targets, *(alias for aliases in targets.values() for alias in aliases)]
    types = {graph.types[name] for name in targets if name in graph.types} | {*graph.gone.values()}
    names += names_and_containers(graph.gone)
    if any(_matches_name(key, name) for name in names):
        return
    if any(class_distance(module_type, key) is not None for module_type in types):
        return
    shown_key = key if isinstance(key, str) else key.__name__
    choices = [*names, *sorted({module_type.__name__ for module_type in types})]
    near = get_close_matches(shown_key, choices, n=3, cutoff=0.5) or choices[:3]
    raise ValueError(
        f"{context}limit {shown_key!r} matches no layer{'' if context else ' or block'}, and no type of one; did you "
        f"mean {' or '.join(map(repr, near))}?"
    )


def minimum_kept(dense: int, limit: float) -> int:
    """Return the smallest number of ``dense`` parameters or channels that must stay under a limit.

    Example:
        >>> minimum_kept(100, 0.75), minimum_kept(10, 0.75), minimum_kept(10, 0.9)
        (25, 3, 1)
    """
    # 10 * (1 - 0.9) is slightly above 1 in floating point, and must not become 2.
    return math.ceil(dense * (1 - limit) - 1e-6)
