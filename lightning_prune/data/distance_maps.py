"""Signed distances to the boundaries of classes, for losses that weight errors by their distance to a boundary.

They are computed in the workers of the data loader, after augmentation, because a Euclidean distance transform takes
longer than a training step of a small network.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

__all__ = ["signed_distances"]


def signed_distances(mask: Tensor, num_classes: int) -> Tensor:
    """Return the distance of each pixel to the boundary of each class: positive outside, negative inside.

    The boundary consists of the outermost pixels of a class, as in RITnet's code (Chaudhary et al., ICCV Workshops
    2019): the distance is 0 there and 1 pixel at their outer neighbours. A class that is absent, or covers the whole
    image, has no boundary, and its distances are 0. Pixels with a class number out of range (``ignore_index``) are
    outside all classes.

    Args:
        mask: class numbers ``(h, w)``, integer.
        num_classes: number of classes.

    Returns:
        ``(num_classes, h, w)`` float32, in units of the image's diagonal.

    Example:
        >>> mask = torch.tensor([[0, 0, 0, 1]])
        >>> (signed_distances(mask, 3) * 17**0.5).round(decimals=3)[:, 0] + 0.0
        tensor([[-2., -1.,  0.,  1.],
                [ 3.,  2.,  1.,  0.],
                [ 0.,  0.,  0.,  0.]])
    """
    pixels = mask.cpu().numpy()
    maps = [_distance_to_boundary(pixels == number) for number in range(num_classes)]
    return torch.from_numpy(np.stack(maps) / math.hypot(*pixels.shape)).float()


def _distance_to_boundary(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the signed distance in pixels to the boundary of one class."""
    if inside.all() or not inside.any():
        return np.zeros(inside.shape)
    outer, inner = distance_transform_edt(~inside), distance_transform_edt(inside)
    return np.asarray(outer - np.maximum(inner - 1, 0))
