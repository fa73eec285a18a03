"""Networks of the three tasks, and thinner or shallower ones with new weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune import Limits, PruningPolicy, one_shot, trace
from lightning_prune.criteria import Criterion, Importance, Observer, Random, Statistics
from lightning_prune.criteria.base import NO_STATISTICS
from lightning_prune.criteria.reduction import groups
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["Floors", "Uniform", "floors_of", "macs_of", "policy", "renewed", "thinner"]

#: layer -> number of channels that it keeps at least
Floors = Mapping[str, int]
LEAST_CHANNELS, LEAST_SHARE = 4, 1 / 8


@dataclass(frozen=True)
class Uniform:
    """Rank units within their group of coupled layers, so that every layer loses the same share.

    Args:
        criterion: orders the units of a group.
    """

    criterion: Criterion

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer | None:
        """Return the observer of the criterion."""
        return self.criterion.observer(graph, model)

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return ``rank / size`` of each unit in its group, in (0, 1]; infinite scores stay."""
        scores, labels = self.criterion(graph, model, statistics), groups(graph)
        shares = np.full(len(scores), np.inf)
        for label in np.unique(labels[np.isfinite(scores)]):
            members = np.flatnonzero((labels == label) & np.isfinite(scores))
            order = members[np.argsort(scores[members], kind="stable")]
            shares[order] = np.arange(1, len(order) + 1) / len(order)
        return shares


def floors_of(net: nn.Module, example: Tensor) -> Floors:
    """Return the number of channels that each layer keeps in any method: 4, or an eighth if that is more."""
    widths = trace(net, example).widths()
    return {_layer(name): _floor(width) for name, width in widths.items()}


def _floor(width: int) -> int:
    """Return the floor of a layer.

    Example:
        >>> [_floor(width) for width in (3, 12, 64, 100)]
        [3, 4, 8, 13]
    """
    return min(width, max(LEAST_CHANNELS, math.ceil(LEAST_SHARE * width)))


def _layer(weight: str) -> str:
    return weight.rpartition(".")[0]


def policy(net: nn.Module, example: Tensor, macs: float, floors: Floors) -> PruningPolicy:
    """Return the policy that cuts the present network to ``macs`` and keeps the floors."""
    widths = {
        _layer(name): width
        for name, width in trace(net, example).widths().items()
        if _layer(name)  # parameters of the whole network, such as class tokens, have no layer
    }
    # The tiny addition keeps the last channel above the floor removable in spite of rounding.
    shares = {name: max(0, width - floors[name]) / width for name, width in widths.items()}
    overrides: dict[str | type, Any] = {
        name: {"share": min(1 - 1e-9, share + 1e-9) if share else 0, "of": "channels"}
        for name, share in shares.items()
    }
    return PruningPolicy({"macs": macs}, limits=Limits(overrides=overrides))


def macs_of(net: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one image."""
    return trace(net, example).cost("macs")


def renewed(net: nn.Module, seed: int) -> nn.Module:
    """Return a copy with newly drawn parameters."""
    copied = copy.deepcopy(net)
    torch.manual_seed(seed)
    for module in copied.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return copied


def thinner(net: nn.Module, example: Tensor, macs: float, floors: Floors, seed: int) -> nn.Module:
    """Return the same architecture, all layers thinner by one factor to ``macs``, with new parameters."""
    net = copy.deepcopy(net)
    one_shot(net, example, policy(net, example, macs, floors), Uniform(Random(seed)))
    return renewed(net, seed)
