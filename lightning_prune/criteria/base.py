"""NEW."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph

#: qualified name of a weight -> one value per filter
Statistics = Mapping[str, NDArray[np.float64]]


def check_importance(graph: ChannelGraph, importance: ArrayLike | Tensor) -> NDArray[np.float64]:
    """Importance as an array; raise ValueError if it does not fit the graph or is NaN where it matters."""
    if isinstance(importance, Tensor):
        importance = importance.detach().cpu().numpy()
    try:
        scores = np.asarray(importance, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"importance must be an array of shape ({graph.num_units},), one number per unit; got "
            f"{type(importance).__name__}"
        ) from error
    if scores.shape != (graph.num_units,):
        raise ValueError(f"importance must have shape ({graph.num_units},), one per unit; got {scores.shape}")
    bad = graph.prunable[np.isnan(scores[graph.prunable])]
    if len(bad):
        layers = [name for name, units in graph.layers.items() if np.isin(units, bad).any()]
        raise ValueError(f"importance is NaN for {len(bad)} units, in {', '.join(layers[:3])}")
    return scores


Values = NDArray[np.float64]


Importance = Values


NOTHING: Statistics = MappingProxyType({})


class Criterion(Protocol):
    """Scores every unit of a graph; the lowest goes first."""

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics, /) -> Importance:
        """Importance per unit, shape (num_units,)."""
        ...


class Gatherer(Protocol):
    """Gathers what a criterion wants to know while training goes on; ``active`` says whether it looks."""

    active: bool

    def detach(self) -> None:
        """Stop for good; what was gathered stays."""
        ...

    def compute(self) -> Statistics:
        """What was gathered, the same in every process."""
        ...

    def state(self) -> dict[str, Any]:
        """What was gathered so far, for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        ...
