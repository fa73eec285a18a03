"""NEW."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.layer_patterns import excluded_layers
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.prunable import _reasons, candidates
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.utils.formatting import si

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
    return _least(graph, UnitPool(graph, limits, dense or DenseSizes.of(graph), channel_multiple), exclude)


def _least(graph: ChannelGraph, stock: UnitPool, exclude: Sequence[str]) -> dict[str, int]:
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
    stock = UnitPool(graph, limits, dense, channel_multiple)
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
    graph: ChannelGraph, stock: UnitPool, limits: Limits, exclude: Sequence[str], channel_multiple: int
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
