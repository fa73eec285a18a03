"""What a criterion wants to know of a network, gathered outside any training (level 3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.criteria.base import Criterion, Gatherer, Statistics
from lightning_prune.criteria.gradients import Gradients
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.training import Training, on_device
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.modules import switched

__all__ = ["observed"]


def observed(
    criterion: Criterion,
    model: nn.Module,
    graph: ChannelGraph,
    example: Example,
    batches: Sequence[Any],
    training: Training,
) -> Statistics:
    """What a criterion wants to know, gathered on a copy: gradients of the loss, or activations in eval mode.

    Both come from calling the loss, which knows what of a batch the network takes.
    """
    model = copy.deepcopy(model)
    watching = PruningSession(model, example, graph, DenseSizes.of(graph))
    if not watching.collect(criterion) or watching.collector is None:
        return {}
    watching.watch(True)
    device = next(model.parameters()).device
    for batch in batches:
        _show(watching.collector, model, training, on_device(batch, device))
    statistics = watching.collector.compute()
    watching.forget()
    return statistics


def _show(collector: Gatherer, model: nn.Module, training: Training, batch: Any) -> None:
    """Have ``collector`` see what the loss of a batch does to the network."""
    if not isinstance(collector, Gradients):
        with torch.no_grad(), switched(model, lambda module: False):
            training.loss(model, batch)
        return
    model.zero_grad()
    if (loss := training.loss(model, batch)) is not None:
        loss.backward()
        collector.update()
