"""Semantic segmentation: a LightningModule, losses, metrics and small networks."""

from lightning_prune.segmentation.losses import CrossEntropy, EpochRamp, WeightedSum
from lightning_prune.segmentation.metrics import mean_iou
from lightning_prune.segmentation.module import SegmentationModule
from lightning_prune.segmentation.networks import AtomMobile, RITnet, UNet
from lightning_prune.segmentation.ritnet_losses import (
    EdgeWeightedCrossEntropy,
    GeneralisedDice,
    SurfaceLoss,
    edge_weights,
)

__all__ = [
    "AtomMobile",
    "CrossEntropy",
    "EdgeWeightedCrossEntropy",
    "EpochRamp",
    "GeneralisedDice",
    "RITnet",
    "SegmentationModule",
    "SurfaceLoss",
    "UNet",
    "WeightedSum",
    "edge_weights",
    "mean_iou",
]
