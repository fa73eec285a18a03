"""Choose residual blocks that vanish together with the channels that are removed, for one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.block_costs import block_costs, units_of_block, vanished_names, without_blocks
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.budget import check_budget, resolve
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.depth_settings import DepthSettings, candidate_blocks
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.select import select
from lightning_prune.utils.vanished import vanished_blocks

__all__ = ["PlanLoss", "select_with_depth", "smallest_network"]

COMPARED = 8  # numbers of blocks; of more, some are left out where each comparison takes time
#: plan -> what the network loses by it; NaN if that cannot be said
PlanLoss = Callable[[Plan], float]


def select_with_depth(
    graph: ChannelGraph,
    importance: Any,
    scores: Mapping[str, float],
    budget: Mapping[str, float],
    settings: DepthSettings | None = None,
    *,
    dense: DenseSizes | None = None,
    loss_of: PlanLoss | None = None,
    **arguments: Any,
) -> Plan:
    """Choose blocks and units to remove, for one budget.

    A block is a unit of many channels' cost. Blocks are ranked by score for each share of the budget's resources
    that goes with them. With the first 0, 1, 2, ... of them gone, :func:`~lightning_prune.select` chooses the units
    for what is left of the budget; of all these plans the one that loses least is taken, as ``loss_of`` says.
    Without that, the loss of a plan is the sum of the scores of its blocks and of the importance of its units, after
    both are brought to one scale: the removal of all inner units of a block is nearly the same event as its
    vanishing, so the median over the blocks of ``score of the block / sum of the importance of its inner units``
    converts the one to the other. That holds for any criterion, but sums leave out that each further channel of a
    narrow layer costs more than the one before, so that too few blocks vanish.

    Args:
        graph: of the network.
        importance: one score per unit, as for :func:`~lightning_prune.select`.
        scores: name of a block -> its importance; only these may vanish.
        budget: as for :func:`~lightning_prune.select`.
        settings: limits, and the number of blocks.
        dense: sizes of the network before any cut.
        loss_of: what the network loses by a plan; not asked for plans that miss the budget while others meet it.
        **arguments: further ones of :func:`~lightning_prune.select`. With an optimal ``selection`` the number of
            blocks is found by greedy plans, and the units that go besides them by the optimal one.

    Returns:
        The plan, whose ``blocks`` vanish.

    Raises:
        ValueError: as for :func:`~lightning_prune.select`, for every number of blocks; or there are fewer blocks than
            asked for.

    Example:
        >>> import torch
        >>> from lightning_prune import L2, trace
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> net = CifarResNet(depth=20, width=8)
        >>> graph = trace(net, torch.zeros(1, 1, 16, 16))
        >>> plan = select_with_depth(graph, L2()(graph, net), {"blocks.1": 0.01, "blocks.4": 9.0}, {"macs": 0.6})
        >>> plan.blocks, plan.reached
        (('blocks.1',), True)
    """
    settings = settings or DepthSettings()
    scores = {name: scores[name] for name in candidate_blocks(blocks_of(graph), settings) if name in scores}
    array = np.asarray(importance.cpu() if hasattr(importance, "cpu") else importance, dtype=np.float64)
    greedy = {key: value for key, value in arguments.items() if key != "selection"}
    order = _ranked(graph, scores, budget, settings)
    numbers = _numbers(graph, order, settings, arguments.get("amount"), dense)
    plans = _plans(graph, array, [order[:number] for number in numbers], budget, dense, greedy)
    best = _least(plans, _SumOfScores(array, scores, _exchange_rate(graph, array, scores)), loss_of)
    if arguments.get("selection", "greedy") == "greedy":
        return best
    return _plan_without(graph, array, best.blocks, budget, dense, arguments)


def _numbers(
    graph: ChannelGraph,
    order: Sequence[str],
    settings: DepthSettings,
    amount: Mapping[str, float] | None,
    dense: DenseSizes | None,
) -> Sequence[int]:
    """Return the numbers of blocks that may vanish in this step.

    Raises:
        ValueError: there are fewer blocks than the settings ask for.
    """
    if settings.blocks is None:
        return _within_step(graph, order, amount, dense)
    missing = max(settings.blocks - len(vanished_blocks(blocks_of(graph).model)), 0)
    if missing > len(order):
        raise ValueError(
            f"{settings.blocks} blocks are to vanish, but limits and exclusions leave {len(order)}"
        )
    return [missing]


def _plans(
    graph: ChannelGraph,
    importance: NDArray[np.float64],
    choices: Sequence[Sequence[str]],
    budget: Mapping[str, float],
    dense: DenseSizes | None,
    arguments: Mapping[str, Any],
) -> list[Plan]:
    """Return the plans without each choice of blocks: those that meet the budget, or all if none does.

    Raises:
        ValueError: there is none.
    """
    plans, error = [], None
    for names in choices:
        try:
            plans.append(_plan_without(graph, importance, names, budget, dense, arguments))
        except ValueError as raised:
            error = raised
    if not plans:
        assert error is not None
        raise error
    return [plan for plan in plans if plan.reached] or plans


@dataclass(frozen=True)
class _SumOfScores:
    """The loss of a plan by the scores of its blocks and the importance of its units, times the rate of exchange."""

    importance: NDArray[np.float64]
    scores: Mapping[str, float]
    rate: float

    def __call__(self, plan: Plan) -> float:
        blocks = sum(self.scores[name] for name in plan.blocks)
        return blocks + self.rate * float(self.importance[plan.remove].sum())


def _least(plans: Sequence[Plan], sums: PlanLoss, loss_of: PlanLoss | None) -> Plan:
    """Return the plan that loses least: by ``loss_of`` if it can compare plans, else by the sums."""
    by_sums = min(plans, key=sums)
    if loss_of is None or len(plans) < 2 or not plans[0].reached:
        return by_sums
    losses: dict[int, float] = {}
    step = math.ceil(len(plans) / COMPARED)
    places = {*range(0, len(plans), step), len(plans) - 1}
    while places:
        losses |= {place: loss_of(plans[place]) for place in sorted(places)}
        if any(math.isnan(loss) for loss in losses.values()):
            return by_sums
        best, step = min(losses, key=lambda place: (losses[place], place)), step // 2
        places = {best - step, best + step} & {*range(len(plans))} - losses.keys() if step else set()
    return plans[best]


def smallest_network(
    graph: ChannelGraph, budget: Mapping[str, float], settings: DepthSettings
) -> ChannelGraph:
    """Return the graph of what is left when all blocks vanish that the settings let vanish, the costliest first.

    Raises:
        ValueError: as for :func:`candidate_blocks`.
    """
    costs = block_costs(graph)
    names = candidate_blocks(blocks_of(graph), settings)
    resources = [resource for resource in budget if resource in graph.cost_models]
    shares = {n: sum(costs[n][r] / max(graph.cost(r), 1) for r in resources) for n in names}
    flat = {
        name: 1 / max(share, 1e-12) ** 2 for name, share in shares.items()
    }  # so that price falls with the cost
    order = _ranked(graph, flat, budget, settings)
    return without_blocks(graph, order if settings.blocks is None else order[: settings.blocks])


def _within_step(
    graph: ChannelGraph, order: Sequence[str], amount: Mapping[str, float] | None, dense: DenseSizes | None
) -> list[int]:
    """Return the numbers of blocks that may vanish in one step: the last one may exceed its amount, no other."""
    if not amount:
        return list(range(len(order) + 1))
    steps = resolve(amount, (dense or DenseSizes.of(graph)).costs, "amount")
    numbers = [0]
    for number in range(1, len(order) + 1):
        before = without_blocks(graph, order[: number - 1])
        if any(graph.cost(r) - before.cost(r) >= step for r, step in steps.items()):
            break
        numbers.append(number)
    return numbers


def _plan_without(
    graph: ChannelGraph,
    importance: NDArray[np.float64],
    names: Sequence[str],
    budget: Mapping[str, float],
    dense: DenseSizes | None,
    arguments: Mapping[str, Any],
) -> Plan:
    """Select the units that go when some blocks have vanished."""
    smaller = without_blocks(graph, names)
    sizes, options = dense or DenseSizes.of(graph), dict(arguments)
    if names and dense is None:
        rules = {key: options[key] for key in ("limits", "exclude", "channel_multiple") if key in options}
        check_budget(smaller, budget, dense=sizes, **rules)
    options["amount"] = _remaining_amount(options.get("amount"), graph, smaller, sizes)
    before = {resource: graph.cost(resource) for resource in graph.cost_models}
    plan = select(smaller, importance, budget, dense=sizes if names else dense, **options)
    costs = {resource: replace(change, before=before[resource]) for resource, change in plan.costs.items()}
    vanished, bare = vanished_names(graph, names), graph.without_trace()
    return replace(plan, costs=costs, blocks=tuple(names), vanished=vanished, graph=bare)


def _remaining_amount(
    amount: Mapping[str, float] | None, graph: ChannelGraph, smaller: ChannelGraph, dense: DenseSizes
) -> dict[str, float] | None:
    """Return what is still to be removed in this step after blocks have vanished, as absolute amounts."""
    if smaller is graph or not amount:
        return None if amount is None else dict(amount)
    steps = resolve(amount, dense.costs, "amount")
    left = {
        resource: step - (graph.cost(resource) - smaller.cost(resource)) for resource, step in steps.items()
    }
    return {resource: max(number, 1 + 1e-9) for resource, number in left.items()}  # one unit at most


def _ranked(
    graph: ChannelGraph, scores: Mapping[str, float], budget: Mapping[str, float], settings: DepthSettings
) -> list[str]:
    """Return the blocks that may vanish under the limits, the least important for their cost first."""
    costs = block_costs(graph)
    resources = [r for r in budget if r in graph.cost_models]

    def price(name: str) -> float:
        shares = [costs[name][r] / max(graph.cost(r), 1) for r in resources]
        return scores[name] / max(sum(shares) / max(len(shares), 1), 1e-12)

    blocks = blocks_of(graph)
    stages = blocks.stages()
    left = {number: len(names) - settings.min_blocks for number, names in enumerate(stages)}
    stage_of = {name: number for number, names in enumerate(stages) for name in names}
    gone = len(vanished_blocks(blocks.model))
    allowed = int(settings.max_depth_ratio * (len(blocks) + gone) + 1e-9) - gone
    order: list[str] = []
    for name in sorted(scores, key=lambda each: (price(each), each)):
        if len(order) < allowed and left[stage_of[name]] > 0:
            order.append(name)
            left[stage_of[name]] -= 1
    return order


def _exchange_rate(
    graph: ChannelGraph, importance: NDArray[np.float64], scores: Mapping[str, float]
) -> float:
    """Return what a unit's importance is to be multiplied by, to be comparable with the scores of blocks."""
    rates = []
    for name, score in scores.items():
        units = importance[units_of_block(graph, name)]
        total = float(units[np.isfinite(units)].sum())
        if total > 0:
            rates.append(score / total)
    return float(np.median(rates)) if rates else 1.0
