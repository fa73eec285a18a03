"""Metrics of segmentation."""

from __future__ import annotations

from torch import Tensor


def mean_iou(per_class: Tensor) -> Tensor:
    """Return the mean IoU over the classes that occur in target or prediction.

    Args:
        per_class: IoU of each class ``(num_classes,)``, NaN for a class that occurs in neither.

    Returns:
        A scalar in [0, 1]; NaN if no class occurs.

    Example:
        >>> import torch
        >>> mean_iou(torch.tensor([0.5, 1.0, float("nan")]))
        tensor(0.7500)
    """
    return per_class.nanmean()
