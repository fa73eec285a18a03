"""Scores of residual blocks during training, on images of the trainer."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L

from lightning_prune.callbacks.compensation import without_autocast
from lightning_prune.criteria.block_scores import block_scores
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.residual_blocks import blocks_of
from lightning_prune.pruning.step import BlockScores
from lightning_prune.selection.depth import DepthSettings
from lightning_prune.trainer.calibration import calibration_batches

__all__ = ["block_scores_in_training"]


def block_scores_in_training(
    trainer: L.Trainer, settings: DepthSettings | None, cut: int
) -> BlockScores | None:
    """Return a function that scores the blocks of a network on training images; None if none may vanish.

    Args:
        trainer: its training data and precision are used.
        settings: of the blocks.
        cut: number of the cut, which determines the images.
    """
    if settings is None:
        return None

    def scores(graph: ChannelGraph) -> Mapping[str, float]:
        blocks = blocks_of(graph)
        batches = calibration_batches(trainer, blocks.model, settings.images, seed=cut)
        with without_autocast(trainer):
            return block_scores(blocks, batches, settings.score)

    return scores
