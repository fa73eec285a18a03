"""Select units: the least important first, until every budget is met, within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_prune.criteria.base import check_importance
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.budget import DEFAULT_LIMITS, check_budget, resolve
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.optimal import OptimalSelection, Selection
from lightning_prune.selection.optimal_plan import improved_plan, step_goals, unreachable
from lightning_prune.selection.plan import Plan, ResourceChange, Stop
from lightning_prune.selection.prunable import removable_units
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.utils.formatting import si

__all__ = ["Plan", "ResourceChange", "check_budget", "select", "si"]


def select(
    graph: ChannelGraph,
    importance: ArrayLike | Tensor,
    budget: Mapping[str, float],
    *,
    amount: Mapping[str, float] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    exclude: Sequence[str] = (),
    channel_multiple: int = 1,
    dense: DenseSizes | None = None,
    selection: Selection = "greedy",
) -> Plan:
    """Choose the units to remove: globally lowest importance first, until **all** budgets are met.

    Deterministic: units of equal importance are ordered by number. The selection ends with the unit by which the
    budget is met; units that a limit forbids are skipped. At least one channel stays in every dimension of every
    parameter.

    Args:
        graph: the units and their costs.
        importance: one score per unit; the lowest is removed first, infinite is never removed. Shape (num_units,).
        budget: resource -> what may remain, a share of the dense model in (0, 1] or an amount above 1.
        amount: resource -> how much of it to remove in this step, as a share or amount likewise: the step ends with
            the unit by which one of these amounts is removed. ``None``: continue until the budget is met.
        limits: how much of a layer or block may be removed.
        exclude: names or globs of layers (or modules that hold them) that keep their filters.
        channel_multiple: each layer that loses filters keeps a multiple of this many: the smallest multiple that is
            not below the number that the ranking alone would keep.
        dense: sizes of the network before any cut; by default those of ``graph``.
        selection: ``"greedy"`` takes units one by one, as said above. ``"optimal"``, or
            :class:`~lightning_prune.OptimalSelection`, chooses the widths of all layers at once by an integer
            program: the units removed have the least importance in all among the plans that meet the budget. A limit
            then holds for the filters of a layer while its inputs are whole, unless the limits are strict.

    Returns:
        The plan. If no unit is left before the budget is met, the plan says so.

    Raises:
        ValueError: a budget, name, importance or multiple is invalid, there is nothing to prune, or (on a
            network that was not cut yet) the limits forbid the budget, or no plan meets it.

    Example:
        >>> from lightning_prune.graph.costs import Term
        >>> out = np.arange(4)
        >>> terms = [Term("conv.weight", 9, (out,))]
        >>> graph = ChannelGraph(4, {}, {"conv.weight": out}, {"conv.weight": 0}, {}, {"params": terms})
        >>> print(select(graph, [3.0, 1.0, 2.0, 4.0], {"params": 0.5}))
        2 units · params 36 → 18 (50.0% of dense, budget 50.0%) · budget met
    """
    if channel_multiple < 1:
        raise ValueError(f"channel_multiple must be at least 1, got {channel_multiple}")
    scores = check_importance(graph, importance)
    is_first_cut = dense is None
    dense = dense or DenseSizes.of(graph)
    targets, steps = resolve(budget, dense.costs, "budget"), resolve(amount or {}, dense.costs, "amount")
    units = removable_units(graph, exclude)
    if is_first_cut:
        check_budget(graph, budget, limits=limits, exclude=exclude, channel_multiple=channel_multiple)
    pool, ranking = UnitPool(graph, limits, dense, channel_multiple), rank_units(units, scores).tolist()
    remove, stopped = take_units(pool, ranking, targets, steps)
    changes = resource_changes(graph, remove, dense, targets)
    plan = Plan(np.array(remove, dtype=np.int64), changes, stopped, pool.closed, graph.without_trace())
    settings = OptimalSelection.of(selection)
    if settings is None or not remove:
        return plan
    new_pool = partial(UnitPool, graph, limits, dense, channel_multiple)
    plan = improved_plan(plan, graph, new_pool, ranking, scores, step_goals(plan, steps), settings)
    if is_first_cut and plan.stopped == "limits":
        raise ValueError(unreachable(plan))
    return plan


def rank_units(units: NDArray[np.int64], importance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sort ``units`` by importance, lowest first, ties by number; units of infinite importance are left out.

    Example:
        >>> rank_units(np.arange(4), np.array([2.0, 1.0, np.inf, 1.0]))
        array([1, 3, 0])
    """
    units = units[np.isfinite(importance[units])]
    return units[np.lexsort((units, importance[units]))]


def take_units(
    pool: UnitPool, ranking: Sequence[int], targets: Mapping[str, float], steps: Mapping[str, float]
) -> tuple[list[int], Stop]:
    """Take units from ``pool`` in order, until the targets are met or one of the steps is complete.

    Args:
        pool: the remaining units.
        ranking: units, least important first.
        targets: resource -> cost at which to stop, if all are met.
        steps: resource -> cost to remove, at which to stop if one is removed.

    Returns:
        The units taken, and why it stopped.
    """
    goals = {resource: pool.cost(resource) - step for resource, step in steps.items()}

    def end() -> Stop | None:
        if pool.meets(targets):
            return "budget"
        return "amount" if any(pool.cost(resource) <= goal for resource, goal in goals.items()) else None

    remove: list[int] = []
    if pool.meets(targets):
        return remove, "budget"
    place, size, grows = 0, 1, pool.takes_blocks({**targets, **goals})
    while place < len(ranking):
        block = ranking[place : place + size]
        # Blocks grow until one of their units is forbidden or the last one; that one is found unit by unit.
        taken = pool.take_block(block, lambda: end() is not None) if size > 1 else pool.offer(block[0])
        if taken is None:
            size = max(size // 8, 1)
            continue
        remove += taken
        place += len(block)
        if (stop := end() if size == 1 else None) is not None:
            return remove, stop
        size = 2 * size if grows else 1
    return remove, "limits"


def resource_changes(
    graph: ChannelGraph, remove: Sequence[int], dense: DenseSizes, targets: Mapping[str, float]
) -> dict[str, ResourceChange]:
    """Return how removing units changes every resource."""
    return {
        resource: ResourceChange(
            graph.cost(resource), graph.cost(resource, remove), dense.costs[resource], targets.get(resource)
        )
        for resource in graph.cost_models
    }
