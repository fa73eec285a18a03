"""Signed distances to the boundaries of classes, for losses that weigh an error by how far off it is.

They are made where samples are made, in the workers of a data loader, after augmentation: a Euclidean distance
transform takes longer than a training step of a small network.
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
    """How far each pixel is from the boundary of each class: positive outside, negative inside.

    The boundary are a class's own outermost pixels, as in RITnet's code (Chaudhary et al., ICCV Workshops 2019): 0
    there, 1 pixel on their outer neighbours. A class that is absent, or everywhere, has no boundary: 0. Pixels
    with a class number out of range (``ignore_index``) lie outside of all classes.

    Args:
        mask: class numbers ``(h, w)``, integer.
        num_classes: of them.

    Returns:
        ``(num_classes, h, w)`` float32, as shares of the image's diagonal.

    Example:
        >>> mask = torch.tensor([[0, 0, 0, 1]])
        >>> (signed_distances(mask, 3) * 17**0.5).round(decimals=3)[:, 0] + 0.0
        tensor([[-2., -1.,  0.,  1.],
                [ 3.,  2.,  1.,  0.],
                [ 0.,  0.,  0.,  0.]])
    """
    pixels = mask.cpu().numpy()
    maps = [_to_boundary(pixels == number) for number in range(num_classes)]
    return torch.from_numpy(np.stack(maps) / math.hypot(*pixels.shape)).float()


def _to_boundary(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Pixels to the boundary of one class."""
    if inside.all() or not inside.any():
        return np.zeros(inside.shape)
    outwards, inwards = distance_transform_edt(~inside), distance_transform_edt(inside)
    return np.asarray(outwards - np.maximum(inwards - 1, 0))
