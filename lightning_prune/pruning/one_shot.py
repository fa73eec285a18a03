"""Prune a network to its budget in one cut, without a trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.compensation.repair import cut_and_compensate_
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.criteria.weights import L2
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.block_scorer import BlockScorer
from lightning_prune.pruning.calibration import first_batches
from lightning_prune.pruning.cut_repair import WITHOUT_TRAINING, compensation_settings
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.step import cut_
from lightning_prune.pruning.training import Training
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.selection.policy import PruningPolicy, with_depth
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.batch_norm import recalibrate_
from lightning_prune.utils.example_inputs import as_example, inputs_of

__all__ = ["one_shot"]


def one_shot(
    model: nn.Module,
    example: Any,
    budget: Mapping[str, float] | PruningPolicy,
    criterion: CriterionLike | None = None,
    batches: Sequence[Any] = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    compensate: bool | CompensationSettings | None = None,
    depth: bool | DepthSettings | None = None,
) -> PruningRecord:
    """Prune ``model`` in place to its budget in one cut, and repair it or estimate its batch norms anew.

    Args:
        model: the network.
        example: its input: a tensor, a tuple, or a dictionary of named ones.
        budget: what must remain, or a whole :class:`~lightning_prune.PruningPolicy`.
        criterion: scores the units; by default ``IPAD(omega=0.25, terms="energy")``, which observes ``batches``, and
            L2 without batches.
        batches: training batches for the statistics of the criterion, and for the repair or the statistics of batch
            norms; without them these stay unchanged.
        loss: ``(network, batch) -> loss``, for criteria that use gradients.
        compensate: fit the remaining layers to the outputs of the dense network on ``batches``, without labels, as
            :func:`~lightning_prune.compensation.cut_and_compensate_` does, and then refine them together in 15 passes
            over the batches. The statistics of batch norms stay then. None: if there are batches. Settings repair
            as they say: ``CompensationSettings()`` without the passes, in a half to a fifth of the time.
        depth: whether residual blocks may vanish as a whole, for the same budget, or settings for that; they are
            scored on ``batches``. See :class:`~lightning_prune.DepthSettings`.

    Returns:
        The record of what was removed.

    Raises:
        ValueError: the budget cannot be met, a name matches nothing, or criterion or repair lack batches or a loss.
            The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(net, torch.zeros(1, 1, 8, 8), {"macs": 0.5})
        >>> net[0].out_channels
        4
    """
    compensate = bool(batches) if compensate is None else compensate
    settings = compensation_settings(compensate, WITHOUT_TRAINING)
    if settings is not None and not batches:
        raise ValueError(
            "compensate needs batches: some 32 images for dense prediction, 128 or more otherwise"
        )
    policy = with_depth(PruningPolicy.of(budget).with_budget(), depth)
    if policy.depth is not None and not batches:
        raise ValueError("depth needs batches, on which blocks are scored: pass some, 64 images or more")
    criterion = criterion or (default_criterion() if batches else L2())
    graph = policy.trace(model, as_example(example))
    policy.check(graph)
    training = Training(batches, loss or _forward, lambda net: 0.0)
    statistics = collect_statistics(criterion, model, graph, batches, training) if batches else {}
    surgery = None if settings is None else partial(_cut_and_compensate_, batches, settings)
    scores = BlockScorer(policy.depth, partial(first_batches, batches), loss) if policy.depth else None
    dense = DenseSizes.of(graph)
    _, record = cut_(model, graph, policy, criterion, statistics, dense, surgery=surgery, block_scores=scores)
    if settings is None:
        inputs = (inputs_of(batch, model.forward) for batch in batches)
        recalibrate_(model, [batch_inputs for batch_inputs in inputs if batch_inputs is not None])
    return record


def _cut_and_compensate_(
    batches: Sequence[Any],
    settings: CompensationSettings,
    model: nn.Module,
    graph: ChannelGraph,
    remove: Units,
    optimizers: Sequence[Optimizer] = (),
    blocks: Sequence[str] = (),
) -> PruningRecord:
    """Cut and repair; warn if the repair was undone, since the network is then no better than without."""
    record, report = cut_and_compensate_(model, graph, remove, batches, optimizers, settings, blocks)
    if not report.accepted:
        warnings.warn(f"the cut was not repaired: {report.reason}", stacklevel=6)  # of the caller of one_shot
    return record


def _forward(net: nn.Module, batch: Any) -> None:
    """Run a forward in place of the loss, for criteria without gradients."""
    if torch.is_grad_enabled():
        raise ValueError("this criterion uses gradients: pass loss=")
    inputs = inputs_of(batch, net.forward)
    if inputs is not None:
        net(*inputs[0], **inputs[1])
