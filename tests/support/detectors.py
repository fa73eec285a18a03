"""Small detectors of torchvision, and batches as they take them: lists of images and of their targets."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

__all__ = ["collate", "detector", "scenes"]


def backbone(width: int = 24) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, width, 3, 2, 1), nn.ReLU(),
    )  # fmt: skip
    layers.out_channels = width
    return layers


def detector(kind: str) -> nn.Module:
    """Return a detector with random weights for images of 64 pixels."""
    if kind == "ssdlite":
        return ssdlite()
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    sizes = {"min_size": 64, "max_size": 64}
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    if kind == "retina":
        return RetinaNet(backbone(), 3, anchor_generator=anchors, **sizes)
    if kind == "mask":
        masks = MultiScaleRoIAlign(["0"], 6, 2)
        return MaskRCNN(
            backbone(), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, mask_roi_pool=masks, **sizes
        )
    return FasterRCNN(backbone(), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)


def ssdlite() -> nn.Module:
    net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    net.transform.min_size, net.transform.max_size, net.transform.fixed_size = (64,), 64, (64, 64)
    return net


def scenes(number: int = 4) -> list:
    """Return images of two sizes, each with one box and its mask."""
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    return [(torch.rand(3, 64, 56 + 8 * (index % 2)), target) for index in range(number)]


def collate(samples: list) -> tuple:
    return tuple(map(list, zip(*samples, strict=True)))
