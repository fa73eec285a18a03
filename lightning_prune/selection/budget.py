"""Budgets: turn shares into absolute amounts, and check that a budget can be met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.layer_patterns import excluded_layers
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.prunable import pin_reasons, removable_units
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.utils.formatting import si
from lightning_prune.utils.hints import did_you_mean

DEFAULT_LIMITS = Limits()
NO_LIMITS = Limits(layers=1.0, min_channels=1)


def resolve(amounts: Mapping[str, float], dense: Mapping[str, int], argument: str) -> dict[str, float]:
    """Convert shares of the dense model to absolute amounts; values above 1 are absolute already.

    Args:
        amounts: resource -> share in (0, 1], or absolute amount above 1.
        dense: resource -> cost of the dense model.
        argument: name of the argument that holds ``amounts``, for error messages.

    Raises:
        ValueError: it is no mapping of numbers, a resource is unknown, or a number is not positive and finite.

    Example:
        >>> resolve({"macs": 0.5, "params": 30}, {"macs": 80, "params": 40}, "budget")
        {'macs': 40.0, 'params': 30.0}
    """
    check_amounts(amounts, argument)
    for resource, value in amounts.items():
        check_names([resource], dense, argument)
        if not (0 < value < math.inf):
            raise ValueError(
                f"{argument} of {resource} must be a share of the dense model in (0, 1] or an absolute amount "
                f"above 1, got {value}"
            )
    return {r: float(value * dense[r] if value <= 1 else value) for r, value in amounts.items()}


def check_names(names: Iterable[str], known: Iterable[str], argument: str) -> None:
    """Raise ValueError if a resource is unknown; the message names the nearest that is known.

    Example:
        >>> check_names(["mac"], ["params", "macs"], "budget")
        Traceback (most recent call last):
        ValueError: unknown resource 'mac' in budget; known are macs, params; did you mean 'macs'?
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, "'{}'")
            text = f"unknown resource {name!r} in {argument}; known are {', '.join(known)}"
            raise ValueError(f"{text}; {hint}" if hint else text)


def check_amounts(amounts: Any, argument: str) -> None:
    """Raise ValueError unless ``amounts`` is a mapping from names of resources to numbers.

    Example:
        >>> check_amounts(0.5, "budget")
        Traceback (most recent call last):
        ValueError: budget must say of which resource how much remains, such as {'macs': 0.5}, got 0.5
    """
    is_right = isinstance(amounts, Mapping) and all(
        isinstance(name, str) and isinstance(value, Real) and not isinstance(value, bool)
        for name, value in amounts.items()
    )
    if not is_right:
        what = (
            "how much a cut removes, such as {'macs': 0.1}"
            if argument == "amount"
            else ("how much remains, such as {'macs': 0.5}")
        )
        raise ValueError(f"{argument} must say of which resource {what}, got {amounts!r}")


def reachable(
    graph: ChannelGraph,
    *,
    limits: Limits = DEFAULT_LIMITS,
    exclude: Sequence[str] = (),
    channel_multiple: int = 1,
    dense: DenseSizes | None = None,
) -> dict[str, int]:
    """Return a lower bound of each resource that holds for every selection, whatever the importance scores.

    For the bound, each class of interchangeable units is cut as far as possible while all other classes stay whole.
    In a real selection other cuts count towards the same limits, so it ends at or above the bound. (The bound does
    not hold for a resource whose function rises when channels are removed.)

    Returns:
        Resource -> lower bound of its cost.
    """
    pool = UnitPool(graph, limits, dense or DenseSizes.of(graph), channel_multiple)
    return _lowest_costs(graph, pool, exclude)


def _lowest_costs(graph: ChannelGraph, pool: UnitPool, exclude: Sequence[str]) -> dict[str, int]:
    remove = pool.largest_cut(removable_units(graph, exclude).tolist())
    return {resource: graph.cost(resource, remove) for resource in graph.cost_models}


def check_budget(
    graph: ChannelGraph,
    budget: Mapping[str, float],
    *,
    limits: Limits = DEFAULT_LIMITS,
    exclude: Sequence[str] = (),
    channel_multiple: int = 1,
    dense: DenseSizes | None = None,
) -> None:
    """Raise ValueError if a budget is malformed or cannot be met; the message names the limits in the way."""
    dense = dense or DenseSizes.of(graph)
    targets = resolve(budget, dense.costs, "budget")
    pool = UnitPool(graph, limits, dense, channel_multiple)
    lowest = _lowest_costs(graph, pool, exclude)
    resource = next((resource for resource, target in targets.items() if lowest[resource] > target), None)
    if resource is None:
        return
    dense_cost = max(dense.costs[resource], 1)
    # Tell the user whether limits are the reason, or pinned and excluded filters.
    unlimited = reachable(
        graph, limits=NO_LIMITS, exclude=exclude, channel_multiple=channel_multiple, dense=dense
    )
    absolute = f" ({budget[resource]} is an amount, since it is above 1)" if budget[resource] > 1 else ""
    raise ValueError(
        f"budget {resource}={budget[resource]}{absolute} cannot be met: limits, exclusions and pinned filters keep "
        f"at least {si(lowest[resource])} ({lowest[resource] / dense_cost:.3f} of the dense model; without limits "
        f"{unlimited[resource] / dense_cost:.3f}); raise the budget, or loosen: "
        f"{'; '.join(_obstacles(graph, pool, limits, exclude, channel_multiple))}"
    )


def _obstacles(
    graph: ChannelGraph, pool: UnitPool, limits: Limits, exclude: Sequence[str], channel_multiple: int
) -> Iterator[str]:
    """Describe each argument that keeps filters, beginning with the limit that closes most layers."""
    for source, closed in sorted(pool.sources.items(), key=lambda item: -len(item[1])):
        yield f"limits {source}, which closes {_first_names(closed)}"
    if limits.strict:
        yield "limits strict=True, by which a layer also closes the layers whose output it reads"
    if exclude:
        yield f"exclude={list(exclude)}, which means {_first_names(sorted(excluded_layers(graph, exclude)))}"
    if channel_multiple > 1:
        yield f"channel_multiple={channel_multiple}"
    if graph.pinned:
        yield f"{len(graph.pinned)} pinned channels ({pin_reasons(graph)})"


def _first_names(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return f"{', '.join(unique[:3])}{more}"
