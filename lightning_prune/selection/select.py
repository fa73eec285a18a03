"""Which units go: the least important first, until every budget is met, within limits (level 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_prune.criteria.base import check_importance
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.budget import NO_LIMITS_GIVEN, check_budget, resolve
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.plan import Plan, ResourceChange, Stop
from lightning_prune.selection.prunable import candidates
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.utils.formatting import si

__all__ = ["Plan", "ResourceChange", "check_budget", "select", "si"]


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
        >>> from lightning_prune.graph.channel_graph import Term
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
    stock = UnitPool(graph, limits, dense, channel_multiple)
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
    stock: UnitPool, ranked: Sequence[int], targets: Mapping[str, float], steps: Mapping[str, float]
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
) -> dict[str, ResourceChange]:
    """What removing units does to every resource."""
    return {
        resource: ResourceChange(
            graph.cost(resource), graph.cost(resource, remove), dense.costs[resource], targets.get(resource)
        )
        for resource in graph.cost_models
    }
