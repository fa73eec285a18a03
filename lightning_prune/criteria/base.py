"""The two protocols of criteria: how units are scored, and what is observed for it during training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.utils.formatting import counted

__all__ = [
    "NO_STATISTICS",
    "Criterion",
    "CriterionLike",
    "FunctionCriterion",
    "Importance",
    "Observer",
    "ObservesNothing",
    "Statistics",
    "Values",
    "as_criterion",
    "check_importance",
]

Values = NDArray[np.float64]
#: One score per unit, shape (num_units,). The lowest is removed first; infinite scores are never removed.
Importance = Values
#: Qualified name of a weight -> one value per filter.
Statistics = Mapping[str, Values]
NO_STATISTICS: Statistics = MappingProxyType({})


class Observer(Protocol):
    """Collects the statistics of a criterion while the network trains.

    It may also define ``mark()`` and ``rewind()``, to go back to what it had collected when a batch began: a batch
    that an exception has ended is observed again when training resumes.

    Attributes:
        active: whether forwards and steps are observed at the moment; set by the caller.
        observes_steps: True if :meth:`on_step` supplies the data, which only training itself can do; False if
            forwards do, so that a separate pass over the data in eval mode serves as well.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> from lightning_prune.criteria import OutputEnergy
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> observer = OutputEnergy().observer(trace(net, torch.zeros(1, 1)), net).attach()
        >>> _ = net(torch.tensor([[1.0], [2.0]]))
        >>> observer.detach()
        >>> len(observer.compute()) > 0
        True
    """

    active: bool
    observes_steps: bool

    def attach(self) -> Observer:
        """Register hooks on the network and return the observer itself."""
        ...

    def detach(self) -> None:
        """Remove the hooks; keep the collected statistics."""
        ...

    def on_step(self, parameters: Iterable[Tensor]) -> None:
        """Observe the gradients of ``parameters`` before their optimizer steps."""
        ...

    def compute(self) -> Statistics:
        """Return the statistics, equal in all processes."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what was collected so far as tensors and plain values, for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        ...


@runtime_checkable
class Criterion(Protocol):
    """Scores every unit of a graph, and says what has to be observed for it.

    Example:
        >>> class Width:
        ...     def observer(self, graph, model):
        ...         return None
        ...     def __call__(self, graph, model, statistics=NO_STATISTICS):
        ...         return np.full(graph.num_units, 1.0 / graph.num_units)
        >>> isinstance(Width(), Criterion)
        True
    """

    def __call__(self, graph: ChannelGraph, model: nn.Module, statistics: Statistics, /) -> Importance:
        """Return one score per unit, shape (num_units,); the lowest is removed first."""
        ...

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer | None:
        """Return a new, detached observer of the statistics that the criterion needs; None if it needs none."""
        ...


#: A :class:`Criterion`, or a plain function that observes nothing. The annotation of all arguments that take either.
CriterionLike = Callable[[ChannelGraph, nn.Module, Statistics], Importance]


class ObservesNothing:
    """Base class of criteria that need no statistics.

    Example:
        >>> class First(ObservesNothing):
        ...     def __call__(self, graph, model, statistics=NO_STATISTICS):
        ...         return -np.arange(float(graph.num_units))
        >>> isinstance(First(), Criterion)
        True
    """

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer | None:
        """Return None: nothing is observed."""
        return None


@dataclass(frozen=True)
class FunctionCriterion:
    """Turn a function ``(graph, model, statistics) -> importance`` into a :class:`Criterion`.

    Args:
        function: scores all units.
        make_observer: ``(graph, model) -> Observer``, if the function needs statistics; None: it gets none.

    Example:
        >>> from lightning_prune.criteria import Collector, MeanActivation, per_unit
        >>> def mean_activation(graph, model, statistics):
        ...     return per_unit(graph, statistics)
        >>> criterion = FunctionCriterion(
        ...     mean_activation, lambda graph, model: Collector(graph, model, MeanActivation)
        ... )
    """

    function: CriterionLike
    make_observer: Callable[[ChannelGraph, nn.Module], Observer] | None = None

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return the function's scores."""
        return self.function(graph, model, statistics)

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer | None:
        """Return the observer that was asked for at construction."""
        return None if self.make_observer is None else self.make_observer(graph, model)


def as_criterion(criterion: CriterionLike) -> Criterion:
    """Return ``criterion`` if it has an ``observer`` method, else wrap the plain function, which observes nothing.

    Example:
        >>> criterion = as_criterion(lambda graph, model, statistics: np.ones(graph.num_units))
        >>> isinstance(criterion, Criterion)
        True
    """
    return criterion if isinstance(criterion, Criterion) else FunctionCriterion(criterion)


def check_importance(graph: ChannelGraph, importance: ArrayLike | Tensor) -> Importance:
    """Return importance as a float64 array of shape (num_units,).

    Raises:
        ValueError: it has another shape, is no array of numbers, or is NaN for a unit that may be removed.
    """
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
        raise ValueError(f"importance is NaN for {counted(len(bad), 'unit')}, in {', '.join(layers[:3])}")
    return scores
