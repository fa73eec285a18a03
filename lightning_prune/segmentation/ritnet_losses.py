"""The losses of RITnet (Chaudhary et al., ICCV Workshops 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EdgeWeightedCrossEntropy", "GeneralisedDice", "SurfaceLoss", "edge_weights"]


def edge_weights(
    target: Tensor, factor: float = 20.0, radius: int = 2, ignore_index: int | None = None
) -> Tensor:
    """Return ``factor`` for pixels with another class in the square of ``radius`` around them, 0 for others.

    This is the morphological gradient of the class numbers, computed by pooling. On label maps, which have no noise
    and sharp edges only, it equals the dilated Canny edges of RITnet.

    Args:
        target: class numbers ``(n, h, w)``.
        factor: weight of an edge.
        radius: largest distance to the edge in pixels.
        ignore_index: class number of pixels that form no edges; None: all do.

    Returns:
        ``(n, h, w)`` float32.

    Example:
        >>> edge_weights(torch.tensor([[[0, 0, 0, 1, 1]]]), radius=1)
        tensor([[[ 0.,  0., 20., 20.,  0.]]])
    """
    classes, window = target.float()[:, None], 2 * radius + 1
    ignored = torch.zeros_like(classes, dtype=torch.bool) if ignore_index is None else classes == ignore_index
    lowest_value = -torch.inf  # never the maximum, like the padding of max_pool2d
    highest = F.max_pool2d(classes.masked_fill(ignored, lowest_value), window, stride=1, padding=radius)
    lowest = -F.max_pool2d((-classes).masked_fill(ignored, lowest_value), window, stride=1, padding=radius)
    return factor * (highest > lowest)[:, 0].float()


class EdgeWeightedCrossEntropy(nn.Module):
    """Cross-entropy with higher weight near edges: ``mean((1 + w) * CE)``, ``w`` from :func:`edge_weights`.

    Each pixel is weighted before the mean; the published code takes the mean first, which removes the effect.

    Args:
        factor: weight of pixels near an edge, added to 1.
        radius: largest distance to the edge in pixels.
        ignore_index: class number of pixels that are left out and form no edges; None: none are.

    Example:
        >>> loss = EdgeWeightedCrossEntropy(factor=2.0, radius=1)
        >>> loss(torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 0, 0, 0]]]))
        tensor(0.6931)
        >>> loss(torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 0, 1, 1]]]))
        tensor(1.3863)
    """

    def __init__(self, factor: float = 20.0, radius: int = 2, ignore_index: int | None = None) -> None:
        super().__init__()
        self.factor, self.radius, self.ignore_index = factor, radius, ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar, of logits ``(n, c, h, w)`` and class numbers ``(n, h, w)``."""
        weights = 1 + edge_weights(target, self.factor, self.radius, self.ignore_index)
        valid, target = _valid_pixels(target, self.ignore_index)
        entropy = F.cross_entropy(logits, target, reduction="none")
        return (weights * entropy * valid).sum() / valid.sum().clamp(min=1)


class GeneralisedDice(nn.Module):
    """Generalised Dice loss (Sudre et al., DLMIA 2017, in RITnet's form), the mean over images.

    ``1 - 2 * sum_c v_c sum(p * g) / sum_c v_c sum(p + g)`` with ``v_c = 1 / clamp((sum g_c)^2, 1e-5)``, for
    probabilities ``p`` and the target ``g`` as 0 or 1. A class that is absent from an image has by far the largest
    weight: if any of it is predicted, the loss of the image is nearly 1.

    Args:
        smallest: lower bound of a class's squared size.
        ignore_index: class number of pixels that do not count; None: all count.

    Example:
        >>> target = torch.tensor([[[0, 1]]])
        >>> right = 50.0 * F.one_hot(target, 2).movedim(-1, 1)
        >>> GeneralisedDice()(right, target)
        tensor(0.)
    """

    def __init__(self, smallest: float = 1e-5, ignore_index: int | None = None) -> None:
        super().__init__()
        self.smallest, self.ignore_index = smallest, ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar, of logits ``(n, c, h, w)`` and class numbers ``(n, h, w)``."""
        valid, target = _valid_pixels(target, self.ignore_index)
        truth = (F.one_hot(target, logits.shape[1]).movedim(-1, 1) * valid[:, None]).float().flatten(2)
        probability = (logits.float().softmax(1) * valid[:, None]).flatten(2)
        weights = 1 / truth.sum(2).square().clamp(min=self.smallest)
        intersection = (weights * (probability * truth).sum(2)).sum(1)
        total = (weights * (probability + truth).sum(2)).sum(1)
        return (1 - 2 * intersection / total.clamp(min=torch.finfo(total.dtype).tiny)).mean()


class SurfaceLoss(nn.Module):
    """Boundary loss (Kervadec et al., MIDL 2019, as in RITnet): a wrong pixel costs more with its distance.

    It is the mean over pixels and classes of ``softmax_c * phi_c``, where ``phi_c`` is the signed distance to the
    boundary of class ``c``, and is negative for correct predictions. Use it together with another loss: predictions
    of a class that is absent from an image cost nothing.

    Args:
        ignore_index: class number of the pixels to leave out; None: none are.

    Example:
        >>> from lightning_prune.data import signed_distances
        >>> target = torch.tensor([[[0, 0, 0, 1]]])
        >>> distances = signed_distances(target[0], 2)[None]
        >>> for labels in torch.tensor([[[[0, 0, 0, 1]]], [[[1, 0, 0, 1]]]]):
        ...     print(SurfaceLoss()(50.0 * F.one_hot(labels, 2).movedim(-1, 1), target, distances))
        tensor(-0.0910)
        tensor(0.0606)
    """

    wants = ("distances",)

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor, distances: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar, of logits and distances ``(n, c, h, w)`` and class numbers ``(n, h, w)``.

        Raises:
            ValueError: there are no distances, or they do not have the shape of the logits.
        """
        if distances is None or distances.shape != logits.shape:
            raise ValueError(_no_distances(logits, distances))
        valid, _ = _valid_pixels(target, self.ignore_index)
        per_pixel = (logits.float().softmax(1) * distances).mean(1)
        return (per_pixel * valid).sum() / valid.sum().clamp(min=1)


def _no_distances(logits: Tensor, distances: Tensor | None) -> str:
    """Return the error message for missing or misshaped distances."""
    entry = "has none" if distances is None else f"has a tensor of shape {tuple(distances.shape)}"
    return (
        f"the surface loss needs signed distances {tuple(logits.shape)} as third entry of the batch, which {entry}: "
        "set distance_maps=true of the data (data.distance_maps=true on the command line); in your own data set, "
        "compute them with lightning_prune.data.signed_distances"
    )


def _valid_pixels(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return 1.0 for pixels with a class and 0.0 for ignored ones, and the class numbers with 0 for ignored ones."""
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    return valid.float(), target.where(valid, 0)
