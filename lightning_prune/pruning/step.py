"""One step of pruning: score, select, cut, and select again without the units that surgery refuses."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
from torch import nn
from torch.optim import Optimizer

from lightning_prune.criteria.base import CriterionLike, Importance, Statistics, check_importance
from lightning_prune.criteria.wrappers import blind_to
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.prune import SurgeryError, prune_
from lightning_prune.surgery.rollback import snapshot
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.distributed import broadcast, check_agreement, from_first
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.modules import named_tensors
from lightning_prune.utils.passing import on_all

__all__ = ["BlockScores", "Surgery", "cut_", "scores_of_blocks"]

ATTEMPTS = 10  # refusals after which whole layers stay


class BlockScores(Protocol):
    """Scores residual blocks, as :class:`~lightning_prune.pruning.block_scorer.BlockScorer`."""

    def __call__(self, graph: ChannelGraph) -> Mapping[str, float]:
        """Return the importance of each residual block that may vanish."""

    def change(self, graph: ChannelGraph, plan: Plan) -> float:
        """Return what the network loses by a plan; NaN if that cannot be said."""


class Surgery(Protocol):
    """Carries out a plan, as :func:`~lightning_prune.prune_`."""

    def __call__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        remove: Units,
        optimizers: Sequence[Optimizer] = (),
        blocks: Sequence[str] = (),
    ) -> PruningRecord:
        """Remove units and blocks, and return the record of what was removed."""


def importance_of(
    criterion: CriterionLike,
    graph: ChannelGraph,
    model: nn.Module,
    statistics: Statistics,
    met_resources: Collection[str] = (),
) -> Importance:
    """Return the importance of all units by ``criterion``, which ignores the cost in ``met_resources``.

    Raises:
        ValueError: the importance does not fit the graph; a note names the criterion.
    """
    try:
        return check_importance(graph, blind_to(criterion, met_resources)(graph, model, statistics))
    except ValueError as error:
        error.add_note(f"criterion: {getattr(criterion, '__qualname__', criterion)}; nothing was cut")
        raise


def cut_(
    model: nn.Module,
    graph: ChannelGraph,
    policy: PruningPolicy,
    criterion: CriterionLike,
    statistics: Statistics,
    dense: DenseSizes,
    optimizers: Sequence[Optimizer] = (),
    surgery: Surgery | None = None,
    block_scores: BlockScores | None = None,
) -> tuple[Plan, PruningRecord]:
    """Score, select and prune once. Units that surgery refuses are pinned, with a warning, and others are selected.

    In a distributed run every process calls this; all carry out the plan of the first one, and it is checked that
    all made the same cut.

    Args:
        model: the network, changed in place.
        graph: its graph.
        policy: what must remain and what may be removed.
        criterion: scores the units.
        statistics: what the criterion's observer collected.
        dense: sizes of the dense network, to which shares refer.
        optimizers: their state is cut along.
        surgery: carries out a plan; by default :func:`~lightning_prune.prune_`.
        block_scores: returns the importance of each residual block that may vanish, and what the network loses by a
            plan; called if the policy has ``depth``.

    Returns:
        The plan that was carried out, and its record (empty if there was nothing to remove).

    Raises:
        SurgeryError: surgery refused every plan; the model is unchanged.
        PassingFailure: the cut failed twice, for lack of memory and the like; the model is unchanged.
        RuntimeError: the processes of a distributed run made different cuts.
    """
    met = policy.met_resources(graph, dense)
    importance = on_all(lambda: importance_of(criterion, graph, model, statistics, met))
    blocks = scores_of_blocks(graph, policy, block_scores)
    restore = snapshot(model, [*named_tensors(model)], optimizers)
    loss_of = None if block_scores is None else partial(block_scores.change, graph)
    plan, refusals = broadcast(policy.plan(graph, importance, dense, blocks, loss_of)), 0
    while plan:
        attempt = partial(_attempt, surgery or prune_, model, graph, plan, optimizers)
        record, error = on_all(attempt, undo=restore)
        check_agreement("the cut", (record.kept, record.vanished) if error is None else str(error))
        if error is None:
            return plan, record
        refusals += 1
        if error.blocks:
            warnings.warn(f"{error}; {', '.join(error.blocks)} stay, selecting again", stacklevel=2)
            blocks = {name: score for name, score in blocks.items() if name not in error.blocks}
        else:
            refused = _refused_units(graph, plan, error, whole_layers=refusals >= ATTEMPTS)
            if not len(refused):
                raise error
            warnings.warn(f"{error}; {_described(graph, refused)}, selecting again", stacklevel=2)
            reasons = dict.fromkeys(refused.tolist(), f"surgery refused: {error}")
            graph = replace(graph, pinned={**reasons, **graph.pinned})
        try:
            plan = broadcast(policy.plan(graph, importance, dense, blocks, loss_of))
        except ValueError:  # nothing is left that could be removed
            raise error from None
    return plan, PruningRecord()


def scores_of_blocks(
    graph: ChannelGraph, policy: PruningPolicy, block_scores: BlockScores | None
) -> dict[str, float]:
    """Return the scores of the blocks that may vanish, the same in all processes; none if no block may.

    Raises:
        ValueError: a block that the policy names cannot vanish, or nothing scores blocks.
    """
    if policy.depth is None or not blocks_of(graph).blocks:
        return {}
    if block_scores is None:
        raise ValueError("blocks may vanish, but nothing scores them: pass batches")
    return dict(from_first(lambda: block_scores(graph)))


def _refused_units(graph: ChannelGraph, plan: Plan, error: SurgeryError, whole_layers: bool) -> Units:
    """Return the units that stay after a refusal: those that it names, or all that were to be removed.

    Args:
        graph: of the network, in which units that were refused before are pinned.
        plan: that was refused.
        error: the refusal.
        whole_layers: return all units of the layers concerned, so that refusals of single units come to an end.
    """
    refused = np.intersect1d(error.units, graph.prunable)
    if len(error.units) and not len(refused):
        refused = np.intersect1d(plan.remove, graph.prunable)
    if whole_layers:
        layers = [units for units in graph.layers.values() if np.isin(units, refused).any()]
        refused = np.intersect1d(np.concatenate([*layers, refused]), graph.prunable)
    return refused


def _described(graph: ChannelGraph, units: Units) -> str:
    """Return how many units stay, and of which layers."""
    names = [name for name, layer_units in graph.layers.items() if np.isin(layer_units, units).any()]
    more = f" and {counted(len(names) - 3, 'more layer')}" if len(names) > 3 else ""
    verb = "stays" if len(units) == 1 else "stay"
    return f"{counted(len(units), 'unit')} of {', '.join(names[:3])}{more} {verb}"


def _attempt(
    surgery: Surgery, model: nn.Module, graph: ChannelGraph, plan: Plan, optimizers: Sequence[Optimizer]
) -> tuple[PruningRecord, SurgeryError | None]:
    """Return the record of a cut, or the reason for which surgery refuses it."""
    try:
        if plan.blocks:
            return surgery(model, graph, plan.remove, optimizers, blocks=plan.blocks), None
        return surgery(model, graph, plan.remove, optimizers), None
    except SurgeryError as error:
        return PruningRecord(), error
