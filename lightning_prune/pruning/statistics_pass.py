"""Collect a criterion's statistics outside of training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.criteria.base import CriterionLike, Observer, Statistics, as_criterion
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.training import Training
from lightning_prune.utils.example_inputs import on_device
from lightning_prune.utils.modules import training_modes

__all__ = ["collect_statistics"]


def collect_statistics(
    criterion: CriterionLike,
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[Any],
    training: Training,
) -> Statistics:
    """Collect what ``criterion`` needs on a copy of ``model``: gradients of the loss, or activations in eval mode.

    Both come from calling the loss, which knows how to feed a batch to the network.

    Returns:
        The statistics; empty if the criterion needs none.
    """
    model = copy.deepcopy(model)
    observer = as_criterion(criterion).observer(graph, model)
    if observer is None:
        return {}
    observer.attach()
    device = next(model.parameters()).device
    for batch in batches:
        _run_batch(observer, model, training, on_device(batch, device))
    statistics = observer.compute()
    observer.detach()
    return statistics


def _run_batch(observer: Observer, model: nn.Module, training: Training, batch: Any) -> None:
    """Run the loss of one batch, with a backward if ``observer`` observes steps."""
    if not observer.observes_steps:
        with torch.no_grad(), training_modes(model, lambda module: False):
            training.loss(model, batch)
        return
    model.zero_grad()
    if (loss := training.loss(model, batch)) is not None:
        loss.backward()
        observer.on_step(model.parameters())
