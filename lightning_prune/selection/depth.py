"""Choose residual blocks that vanish together with the channels that are removed, for one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_prune.criteria.block_scores import BlockMethod
from lightning_prune.graph.block_costs import block_costs, units_of_block, vanished_names, without_blocks
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.residual_blocks import ResidualBlocks, blocks_of
from lightning_prune.selection.budget import check_budget, resolve
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.layer_patterns import names_and_containers
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.select import select
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.vanished import vanished_blocks

__all__ = ["DepthSettings", "candidate_blocks", "select_with_depth"]


@dataclass(frozen=True)
class DepthSettings:
    """Which residual blocks may vanish, how many, and how they are scored.

    Args:
        score: how blocks are scored, see :func:`~lightning_prune.criteria.block_scores.block_scores`.
        blocks: exactly so many vanish; None: as many as cost the network least, together with the channels that then
            have to go for the budget.
        max_depth_ratio: at most this share of all blocks that may vanish.
        min_blocks: so many of the blocks of each stage (a run of blocks with one shape) that may vanish must stay.
        include: names or globs of blocks, or of modules in them or around them; only these may vanish.
        exclude: likewise; these stay.
        images: number of images for the scores.

    Raises:
        ValueError: a number is out of range, or the score is unknown.

    Example:
        >>> DepthSettings(max_depth_ratio=0.3, exclude=["layer1.*"]).score
        'outputs'
    """

    score: BlockMethod = "outputs"
    blocks: int | None = None
    max_depth_ratio: float = 0.5
    min_blocks: int = 0
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    images: int = 64

    def __post_init__(self) -> None:
        check_choice("the score of blocks", self.score, get_args(BlockMethod))
        for argument in ("include", "exclude"):
            if isinstance(getattr(self, argument), str):
                raise ValueError(
                    f"{argument} is a list of names or globs, got a text: write [{getattr(self, argument)!r}]"
                )
        if not 0 <= self.max_depth_ratio <= 1:
            raise ValueError(f"max_depth_ratio must be a share from 0 to 1, got {self.max_depth_ratio}")
        if self.min_blocks < 0 or self.images < 1 or (self.blocks is not None and self.blocks < 0):
            raise ValueError("min_blocks and blocks must be 0 or more, images 1 or more")

    @classmethod
    def of(cls, depth: bool | DepthSettings | None) -> DepthSettings | None:
        """Return the settings that an argument ``depth`` stands for; None: no block vanishes."""
        if isinstance(depth, DepthSettings) or depth is None:
            return depth
        if not isinstance(depth, bool):
            raise ValueError(f"depth must be True, False or DepthSettings, got {depth!r}")
        return cls() if depth else None


def candidate_blocks(blocks: ResidualBlocks, settings: DepthSettings) -> list[str]:
    """Return the blocks that the settings let vanish, in the order of the forward.

    Raises:
        ValueError: a pattern matches no block, ``include`` names one that cannot vanish, or no block is left, unless
            some have vanished before.
    """
    gone = vanished_blocks(blocks.model)
    if not blocks.blocks and gone:
        return []
    if not blocks.blocks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(blocks.fixed.items())[:3])
        raise ValueError(
            f"no residual block can vanish ({reasons or 'the network adds no branch to its input'})"
        )
    included = _matching(blocks, settings.include, "include") if settings.include else set(blocks)
    excluded = _matching(blocks, settings.exclude, "exclude")
    blocks.check(name for name in settings.include if name in blocks.fixed)
    if not included & {*blocks.blocks, *gone}:
        blocks.check(sorted(included))
    candidates = [name for name in blocks if name in included and name not in excluded]
    if not candidates and not gone:
        raise ValueError("include and exclude leave no residual block that could vanish")
    return candidates


def _matching(blocks: ResidualBlocks, patterns: Sequence[str], argument: str) -> set[str]:
    """Return the blocks, also those that cannot vanish, that patterns match by their own or a module's name."""
    others = (*blocks.fixed, *vanished_blocks(blocks.model))
    names = {name: {*names_and_containers([name])} for name in others}
    for name, block in blocks.blocks.items():
        names[name] = {*names_and_containers([name]), *block.modules}
    matched = set()
    for pattern in patterns:
        found = {name for name, aliases in names.items() if any(fnmatchcase(a, pattern) for a in aliases)}
        if not found:
            raise ValueError(
                f"{argument} {pattern!r} matches no residual block; there are {', '.join(list(names)[:6])}"
                f"{' and more' if len(names) > 6 else ''}"
            )
        matched |= found
    return matched


def select_with_depth(
    graph: ChannelGraph,
    importance: Any,
    scores: Mapping[str, float],
    budget: Mapping[str, float],
    settings: DepthSettings | None = None,
    *,
    dense: DenseSizes | None = None,
    **arguments: Any,
) -> Plan:
    """Choose blocks and units to remove, for one budget.

    A block is a unit of many channels' cost. Blocks are ranked by score for each share of the budget's resources
    that goes with them. With the first 0, 1, 2, ... of them gone, :func:`~lightning_prune.select` chooses the units
    for what is left of the budget; of all these plans the one that loses least is taken. The loss of a plan is the
    sum of the scores of its blocks and of the importance of its units, after both are brought to one scale: the
    removal of all inner units of a block is nearly the same event as its vanishing, so the median over the blocks of
    ``score of the block / sum of the importance of its inner units`` converts the one to the other. It holds for any
    criterion.

    Args:
        graph: of the network.
        importance: one score per unit, as for :func:`~lightning_prune.select`.
        scores: name of a block -> its importance; only these may vanish.
        budget: as for :func:`~lightning_prune.select`.
        settings: limits, and the number of blocks.
        dense: sizes of the network before any cut.
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
    order = _ranked(graph, scores, budget, settings)
    numbers: Sequence[int] = range(len(order) + 1)
    if settings.blocks is not None:
        missing = max(settings.blocks - len(vanished_blocks(blocks_of(graph).model)), 0)
        if missing > len(order):
            raise ValueError(
                f"{settings.blocks} blocks are to vanish, but limits and exclusions leave {len(order)}"
            )
        numbers = [missing]
    else:
        numbers = _within_step(graph, order, arguments.get("amount"), dense)
    array = np.asarray(importance.cpu() if hasattr(importance, "cpu") else importance, dtype=np.float64)
    rate = _exchange_rate(graph, array, scores)
    plans, error = [], None
    greedy = {key: value for key, value in arguments.items() if key != "selection"}
    for number in numbers:
        try:
            plan = _plan_without(graph, array, order[:number], budget, dense, greedy)
        except ValueError as raised:
            error = raised
            continue
        loss = sum(scores[name] for name in plan.blocks) + rate * float(array[plan.remove].sum())
        plans.append((not plan.reached, loss, number, plan))
    if not plans:
        assert error is not None
        raise error
    best = min(plans, key=lambda each: each[:3])[3]
    if arguments.get("selection", "greedy") == "greedy":
        return best
    return _plan_without(graph, array, best.blocks, budget, dense, arguments)


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
