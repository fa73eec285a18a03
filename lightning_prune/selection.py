"""Which units go: the least important first, until every budget is met, within limits (level 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_prune.graph import ChannelGraph
from lightning_prune.limits import DenseSizes, Limits
from lightning_prune.naming import excluded_layers
from lightning_prune.plans import Plan, Spent, Stop, si
from lightning_prune.stock import Stock

__all__ = ["Plan", "Spent", "check_budget", "reachable", "select", "si"]

NO_LIMITS_GIVEN = Limits()
NO_LIMITS = Limits(layers=1.0)


def resolve(wanted: Mapping[str, float], dense: Mapping[str, int], what: str) -> dict[str, float]:
    """Shares of the dense model, or absolute amounts above 1, as absolute amounts.

    Raises:
        ValueError: an unknown resource, or a number that is not positive.

    Example:
        >>> resolve({"macs": 0.5, "params": 30}, {"macs": 80, "params": 40}, "budget")
        {'macs': 40.0, 'params': 30.0}
    """
    for resource, value in wanted.items():
        if resource not in dense:
            raise ValueError(f"unknown resource {resource!r} in {what}; known are {', '.join(sorted(dense))}")
        if not (0 < value < math.inf):
            raise ValueError(
                f"{what} of {resource} must be a share of the dense model in (0, 1] or an absolute amount "
                f"above 1, got {value}"
            )
    return {r: float(value * dense[r] if value <= 1 else value) for r, value in wanted.items()}


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


def candidates(graph: ChannelGraph, exclude: Sequence[str] = ()) -> NDArray[np.int64]:
    """The units that may go: prunable, and no filter of an excluded layer.

    Raises:
        ValueError: nothing is left, or a pattern in ``exclude`` matches no layer.
    """
    if not len(graph.prunable):
        raise ValueError(f"nothing to prune: {_why_pinned(graph)}")
    stay = [graph.layers[name] for name in sorted(excluded_layers(graph, exclude))]
    units = graph.prunable[~np.isin(graph.prunable, np.concatenate([*stay, np.empty(0, np.int64)]))]
    if not len(units):
        raise ValueError(f"nothing to prune: exclude={list(exclude)} covers every layer; exclude fewer")
    return units


def _why_pinned(graph: ChannelGraph) -> str:
    if not graph.layers:
        return "the traced forward uses no convolution or linear layer"
    return f"every filter must stay ({_reasons(graph)})"


def _reasons(graph: ChannelGraph) -> str:
    return "; ".join(list(dict.fromkeys(graph.pinned.values()))[:3])


def reachable(
    graph: ChannelGraph,
    *,
    limits: Limits = NO_LIMITS_GIVEN,
    exclude: Sequence[str] = (),
    channel_multiple: int = 1,
    dense: DenseSizes | None = None,
) -> dict[str, int]:
    """A bound below which no selection can bring each resource, whatever the importance.

    Each class of interchangeable units is cut as far as it could be if nothing else were; limits close sooner
    when others are cut too, so what a ranking reaches lies above. (A resource with functions that rise when channels
    go may come out lower.)
    """
    return _least(graph, Stock(graph, limits, dense or DenseSizes.of(graph), channel_multiple), exclude)


def _least(graph: ChannelGraph, stock: Stock, exclude: Sequence[str]) -> dict[str, int]:
    gone = stock.most(candidates(graph, exclude).tolist())
    return {resource: graph.cost(resource, gone) for resource in graph.cost_models}


def check_budget(
    graph: ChannelGraph,
    budget: Mapping[str, float],
    *,
    limits: Limits = NO_LIMITS_GIVEN,
    exclude: Sequence[str] = (),
    channel_multiple: int = 1,
    dense: DenseSizes | None = None,
) -> None:
    """Raise ValueError for a budget that is malformed, or forbidden: by which limits, and what is reachable."""
    dense = dense or DenseSizes.of(graph)
    targets = resolve(budget, dense.costs, "budget")
    stock = Stock(graph, limits, dense, channel_multiple)
    least = _least(graph, stock, exclude)
    forbidden = next((resource for resource, target in targets.items() if least[resource] > target), None)
    if forbidden is None:
        return
    kept, whole = least[forbidden], max(dense.costs[forbidden], 1)
    free = reachable(graph, limits=NO_LIMITS, exclude=exclude, channel_multiple=channel_multiple, dense=dense)
    raise ValueError(
        f"budget {forbidden}={budget[forbidden]} cannot be met: limits, exclusions and pinned filters keep at least "
        f"{si(kept)} ({kept / whole:.3f} of the dense model; without limits {free[forbidden] / whole:.3f}); raise "
        f"it, or loosen: {'; '.join(_in_the_way(graph, stock, limits, exclude, channel_multiple))}"
    )


def _in_the_way(
    graph: ChannelGraph, stock: Stock, limits: Limits, exclude: Sequence[str], channel_multiple: int
) -> Iterator[str]:
    """What keeps filters that could go otherwise, the limit that closes most first."""
    for source, closed in sorted(stock.sources.items(), key=lambda item: -len(item[1])):
        yield f"limits {source}, which closes {_some(closed)}"
    if limits.strict:
        yield "limits strict=True, by which a layer closes those that it reads"
    if exclude:
        yield f"exclude={list(exclude)}, which means {_some(sorted(excluded_layers(graph, exclude)))}"
    if channel_multiple > 1:
        yield f"channel_multiple={channel_multiple}"
    if graph.pinned:
        yield f"{len(graph.pinned)} pinned channels ({_reasons(graph)})"


def _some(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return f"{', '.join(unique[:3])}{more}"


def select(
    graph: ChannelGraph,
    importance: ArrayLike | Tensor,
    budget: Mapping[str, float],
    *,
    amount: Mapping[str, float] | None = None,
    limits: Limits = NO_LIMITS_GIVEN,
    exclude: Sequence[str] = (),
    channel_multiple: int = 1,
    dense: DenseSizes | None = None,
) -> Plan:
    """Choose the units to remove: globally lowest importance first, until **all** budgets are met.

    Deterministic: ties go by unit number. The last unit that meets the budget is the last one taken; units
    that limits forbid are passed over. At least one channel stays in every dimension of every parameter.

    Args:
        graph: the units and their costs.
        importance: one score per unit, lowest goes first; infinite never goes. Shape (num_units,).
        budget: resource -> what may remain, a share of the dense model in (0, 1] or an amount above 1.
        amount: resource -> how much of it goes in this step, likewise: the step ends with the unit by which
            one of these amounts is gone. ``None``: all the way.
        limits: how much of a layer or block may go.
        exclude: names or globs of layers (or what holds them) whose filters stay.
        channel_multiple: a layer that loses filters keeps a multiple of this many: the nearest one that is
            not below what the ranking asks for.
        dense: sizes of the network before any cut; by default those of ``graph``.

    Returns:
        The plan. If candidates run out before the budget is met, it says so.

    Raises:
        ValueError: a budget, name, importance or multiple that makes no sense, nothing to prune, or (on a
            network that was not cut yet) a budget that limits forbid.

    Example:
        >>> from lightning_prune.graph import Term
        >>> out = np.arange(4)
        >>> terms = [Term("conv.weight", 9, (out,))]
        >>> graph = ChannelGraph(4, {}, {"conv.weight": out}, {"conv.weight": 0}, {}, {"params": terms})
        >>> print(select(graph, [3.0, 1.0, 2.0, 4.0], {"params": 0.5}))
        2 units · params 36 → 18 (50.0% of dense, budget 50.0%) · budget met
    """
    if channel_multiple < 1:
        raise ValueError(f"channel_multiple must be at least 1, got {channel_multiple}")
    scores = check_importance(graph, importance)
    first_cut = dense is None
    dense = dense or DenseSizes.of(graph)
    targets, steps = resolve(budget, dense.costs, "budget"), resolve(amount or {}, dense.costs, "amount")
    units = candidates(graph, exclude)
    if first_cut:
        check_budget(graph, budget, limits=limits, exclude=exclude, channel_multiple=channel_multiple)
    stock = Stock(graph, limits, dense, channel_multiple)
    taken, stopped = take(stock, ranked(units, scores).tolist(), targets, steps)
    return Plan(np.array(taken, dtype=np.int64), spent(graph, taken, dense, targets), stopped, stock.closed)


def ranked(units: NDArray[np.int64], importance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Those of ``units`` that may go, least important first; ties by number.

    Example:
        >>> ranked(np.arange(4), np.array([2.0, 1.0, np.inf, 1.0]))
        array([1, 3, 0])
    """
    units = units[np.isfinite(importance[units])]
    return units[np.lexsort((units, importance[units]))]


def take(
    stock: Stock, ranked: Sequence[int], targets: Mapping[str, float], steps: Mapping[str, float]
) -> tuple[list[int], Stop]:
    """Take units from ``stock`` in order; return them and what ended it."""
    taken: list[int] = []
    goals = {resource: stock.cost(resource) - most for resource, most in steps.items()}
    if stock.within(targets):
        return taken, "budget"
    for unit in ranked:
        taken += stock.offer(unit)
        if stock.within(targets):
            return taken, "budget"
        if any(stock.cost(resource) <= goal for resource, goal in goals.items()):
            return taken, "amount"
    return taken, "limits"


def spent(
    graph: ChannelGraph, remove: Sequence[int], dense: DenseSizes, targets: Mapping[str, float]
) -> dict[str, Spent]:
    """What removing units does to every resource."""
    return {
        resource: Spent(
            graph.cost(resource), graph.cost(resource, remove), dense.costs[resource], targets.get(resource)
        )
        for resource in graph.cost_models
    }
