"""One step of pruning: score, select, cut, and try again without what surgery refuses (level 3)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from lightning_prune.criteria.base import Criterion, Importance, Statistics, check_importance
from lightning_prune.criteria.wrappers import blind_to
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.prune import SurgeryError, prune_
from lightning_prune.utils.distributed import agreed, shared

__all__ = [
    "PruningPolicy",
    "cut_",
]

ATTEMPTS = 5


def scored(
    criterion: Criterion,
    graph: ChannelGraph,
    model: nn.Module,
    statistics: Statistics,
    met: Collection[str] = (),
) -> Importance:
    """Importance by a criterion that need no longer look at what ``met`` costs.

    Raises:
        ValueError: it does not fit the graph; the message names the criterion.
    """
    try:
        return check_importance(graph, blind_to(criterion, met)(graph, model, statistics))
    except ValueError as error:
        error.add_note(f"criterion: {getattr(criterion, '__qualname__', criterion)}; nothing was cut")
        raise


def cut_(
    model: nn.Module,
    graph: ChannelGraph,
    rules: PruningPolicy,
    criterion: Criterion,
    statistics: Statistics,
    dense: DenseSizes,
    optimizers: Sequence[Optimizer] = (),
) -> tuple[Plan, PruningRecord]:
    """Score, select and prune once. What surgery refuses is pinned, with a warning, and selected around.

    In a distributed run every process calls this; all carry out the plan of the first one, and whether they all
    did the same is checked.

    Args:
        model: the network, changed in place.
        graph: its graph.
        rules: what is to remain and what may go.
        criterion: scores the units.
        statistics: what it may want to know of the activations.
        dense: what shares refer to.
        optimizers: whose state is cut along.

    Returns:
        What was done, and its record (empty if there was nothing to remove).

    Raises:
        SurgeryError: surgery refuses again and again; the model is as it was.
        RuntimeError: the processes of a distributed run did not do the same.
    """
    importance = scored(criterion, graph, model, statistics, rules.within(graph, dense))
    for attempt in range(1, ATTEMPTS + 1):
        plan = shared(rules.plan(graph, importance, dense))
        if not len(plan):
            return plan, PruningRecord()
        record, error = _attempt(model, graph, plan, optimizers)
        agreed("the cut", record.kept if error is None else str(error))
        if error is None:
            return plan, record
        if not len(error.units) or attempt == ATTEMPTS:
            raise error
        warnings.warn(f"{error}; {len(error.units)} units stay, selecting again", stacklevel=2)
        refused = dict.fromkeys(error.units.tolist(), f"surgery refused: {error}")
        graph = replace(graph, pinned={**refused, **graph.pinned})
    raise AssertionError("unreachable")


def _attempt(
    model: nn.Module, graph: ChannelGraph, plan: Plan, optimizers: Sequence[Optimizer]
) -> tuple[PruningRecord, SurgeryError | None]:
    """The record of a cut, or what surgery says against it."""
    try:
        return prune_(model, graph, plan.remove, optimizers), None
    except SurgeryError as error:
        return PruningRecord(), error
