"""One shot: a network cut to its budget at once (level 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.weights import L2
from lightning_prune.pruning.statistics_pass import observed
from lightning_prune.pruning.step import cut_
from lightning_prune.pruning.training import Training
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.batch_norm import recalibrate_
from lightning_prune.utils.example_inputs import as_example, inputs_of

__all__ = ["one_shot"]

BY_NORM = L2()


def one_shot(
    model: nn.Module,
    example: Any,
    rules: PruningPolicy,
    criterion: Criterion = BY_NORM,
    batches: Sequence[Any] = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> PruningRecord:
    """Prune ``model`` in place to its budget in one cut, by any criterion, and estimate its batch norms anew.

    Train it afterwards, or not.

    Args:
        model: the network.
        example: its input: a tensor, a tuple, or a dictionary of named ones.
        rules: the budget and what may go.
        criterion: scores the units.
        batches: that batch norms are estimated on, and what the criterion looks at; without them norms stay.
        loss: ``(network, batch) -> loss``, for criteria that look at gradients.

    Raises:
        ValueError: the budget or a name makes no sense, or the criterion lacks batches or a loss; nothing changes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(net, torch.zeros(1, 1, 8, 8), Rules({"macs": 0.5}))
        >>> net[0].out_channels
        4
    """
    given = as_example(example)
    graph = rules.traced(model, given)
    rules.check(graph)
    training = Training(batches, loss or _forward, lambda net: 0.0)
    statistics = observed(criterion, model, graph, given, batches, training) if batches else {}
    _, record = cut_(model, graph, rules, criterion, statistics, DenseSizes.of(graph))
    inputs = (inputs_of(batch, model.forward) for batch in batches)
    recalibrate_(model, [found for found in inputs if found is not None])
    return record


def _forward(net: nn.Module, batch: Any) -> None:
    """What takes the place of a loss where nobody asks for gradients."""
    if torch.is_grad_enabled():
        raise ValueError("this criterion looks at gradients: pass loss=")
    inputs = inputs_of(batch, net.forward)
    if inputs is not None:
        net(*inputs[0], **inputs[1])
