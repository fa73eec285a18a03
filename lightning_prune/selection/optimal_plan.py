"""Plans of an optimal selection, which begin with the plan of a greedy one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.optimal import OptimalSelection, OptimalUnits, optimal_units
from lightning_prune.selection.plan import Plan, ResourceChange, Stop
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.utils.formatting import si

__all__ = ["improved_plan", "step_goals", "unreachable"]

Goals = Sequence[Mapping[str, float]]


def step_goals(plan: Plan, steps: Mapping[str, float]) -> Goals:
    """Return the targets of a step: any one of them has to be met.

    Args:
        plan: of the same network, with its budget.
        steps: resource -> cost to remove in this step; empty: everything down to the budget.

    Returns:
        The budget; or, with steps, a goal for each resource that is above its budget.
    """
    targets = {r: change.target for r, change in plan.costs.items() if change.target is not None}
    before = {r: plan.costs[r].before for r in steps}
    unmet = {r: step for r, step in steps.items() if before[r] > targets.get(r, 0.0)}
    goals = [{r: max(targets.get(r, 0.0), before[r] - step)} for r, step in unmet.items()]
    return goals or [{r: before[r] - step} for r, step in steps.items()] or [targets]


def improved_plan(
    plan: Plan,
    graph: ChannelGraph,
    new_pool: Callable[[], UnitPool],
    ranking: Sequence[int],
    importance: NDArray[np.float64],
    goals: Goals,
    settings: OptimalSelection,
) -> Plan:
    """Return the plan of least importance that meets one of the goals, in place of a greedy plan.

    Args:
        plan: the greedy one.
        graph: of the network.
        new_pool: returns a new pool of all units.
        ranking: units that may be removed, the least important first.
        importance: of each unit, shape (num_units,).
        goals: see :func:`step_goals`.
        settings: of the optimal selection, whose time is shared by all goals.
    """
    shared = replace(settings, time_limit=settings.time_limit / len(goals))
    greedy = plan.remove.tolist()
    results = [optimal_units(graph, new_pool(), ranking, importance, goal, shared, greedy) for goal in goals]
    best = min(results, key=lambda result: (not result.met, importance[result.units].sum()))
    costs = {
        resource: replace(change, after=graph.cost(resource, best.units))
        for resource, change in plan.costs.items()
    }
    return replace(
        plan,
        remove=np.array(best.units, dtype=np.int64),
        costs=costs,
        stopped=_stop(best, costs),
        closed=_closed_layers(new_pool, ranking, best.units),
        gap=best.gap,
    )


def _stop(result: OptimalUnits, costs: Mapping[str, ResourceChange]) -> Stop:
    if all(change.met for change in costs.values()):
        return "budget"
    return "amount" if result.met else "limits"


def _closed_layers(
    new_pool: Callable[[], UnitPool], ranking: Sequence[int], removed: Sequence[int]
) -> Mapping[str, str]:
    """Return the layers that are as narrow as their limits allow, with the reasons."""
    trial, pool = new_pool(), new_pool()
    numbers, members = Counter(trial.classes[unit] for unit in removed), dict[int, list[int]]()
    for unit in ranking:
        members.setdefault(trial.classes[unit], []).append(unit)
    for unit_class, number in numbers.items():
        if number == trial.cut_sizes(members[unit_class])[-1]:
            pool.cut_sizes(members[unit_class])  # which closes the class
    return pool.closed


def unreachable(plan: Plan) -> str:
    """Return the message for a plan that misses its budget although it is the nearest to it."""
    budget = ", ".join(
        f"{resource}={change.target / max(change.dense, 1):.3g}"
        for resource, change in plan.costs.items()
        if change.target is not None
    )
    reached = ", ".join(
        f"{resource} {si(change.after)} ({change.share:.3f} of the dense model)"
        for resource, change in plan.costs.items()
        if change.target is not None
    )
    return (
        f"no plan meets the budget {budget} under these limits, exclusions and multiples; the nearest leaves "
        f"{reached}: raise the budget, or loosen the limits. Nothing was changed"
    )
