"""Scores of residual blocks during training, on images of the trainer."""

from __future__ import annotations

from functools import partial

import lightning as L

from lightning_prune.callbacks.compensation import without_autocast
from lightning_prune.pruning.block_scorer import BlockScorer
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.trainer.calibration import calibration_batches

__all__ = ["block_scores_in_training"]


def block_scores_in_training(
    trainer: L.Trainer, settings: DepthSettings | None, cut: int
) -> BlockScorer | None:
    """Return what scores the blocks of a network on training images; None if none may vanish.

    Args:
        trainer: its training data and precision are used.
        settings: of the blocks.
        cut: number of the cut, which determines the images.
    """
    if settings is None:
        return None
    images = partial(calibration_batches, trainer, seed=cut)
    return BlockScorer(settings, images, context=partial(without_autocast, trainer))
