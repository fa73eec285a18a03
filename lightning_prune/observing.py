"""What a criterion wants to know of a network, gathered outside any training (level 3)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.batches import Example, inputs_of, switched
from lightning_prune.candidates import Training, on_device
from lightning_prune.criteria import Criterion, Gradients
from lightning_prune.cutting import Run
from lightning_prune.graph import ChannelGraph
from lightning_prune.limits import DenseSizes
from lightning_prune.statistics import Statistics

__all__ = ["observed"]


def observed(
    criterion: Criterion,
    model: nn.Module,
    graph: ChannelGraph,
    example: Example,
    batches: Sequence[Any],
    training: Training,
) -> Statistics:
    """What a criterion wants to know, gathered on a copy: gradients of the loss, or activations in eval mode."""
    model = copy.deepcopy(model)
    watching = Run(model, example, graph, DenseSizes.of(graph))
    if not watching.collect(criterion) or watching.collector is None:
        return {}
    watching.watch(True)
    device = next(model.parameters()).device
    for batch in (on_device(batch, device) for batch in batches):
        if isinstance(watching.collector, Gradients):
            model.zero_grad()
            training.loss(model, batch).backward()
            watching.collector.update()
        elif (inputs := inputs_of(batch, model.forward)) is not None:
            with torch.no_grad(), switched(model, lambda module: False):
                model(*inputs[0], **inputs[1])
    statistics = watching.collector.compute()
    watching.forget()
    return statistics
