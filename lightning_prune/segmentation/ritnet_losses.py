"""The losses of RITnet (Chaudhary et al., ICCV Workshops 2019): tensors in, scalar out (level 0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EdgeWeightedCrossEntropy", "GeneralisedDice", "SurfaceLoss", "edge_weights"]


def edge_weights(
    target: Tensor, factor: float = 20.0, radius: int = 2, ignore_index: int | None = None
) -> Tensor:
    """``factor`` where another class is within ``radius`` pixels (in the square around), 0 elsewhere.

    The morphological gradient of the class numbers, by pooling, on the device. On a label map, which has no noise and
    only sharp edges, that is what RITnet's dilated Canny edges are.

    Args:
        target: class numbers ``(n, h, w)``.
        factor: weight of an edge.
        radius: in pixels.
        ignore_index: class number of pixels that make no edge; None: all do.

    Returns:
        ``(n, h, w)`` float32.

    Example:
        >>> edge_weights(torch.tensor([[[0, 0, 0, 1, 1]]]), radius=1)
        tensor([[[ 0.,  0., 20., 20.,  0.]]])
    """
    classes, window = target.float()[:, None], 2 * radius + 1
    ignored = torch.zeros_like(classes, dtype=torch.bool) if ignore_index is None else classes == ignore_index
    nothing = -torch.inf
    highest = F.max_pool2d(classes.masked_fill(ignored, nothing), window, stride=1, padding=radius)
    lowest = -F.max_pool2d((-classes).masked_fill(ignored, nothing), window, stride=1, padding=radius)
    return factor * (highest > lowest)[:, 0].float()


class EdgeWeightedCrossEntropy(nn.Module):
    """``mean (1 + w) * CE``, weighted pixel by pixel before the mean (the published code averaged first).

    Args:
        factor: further weight of pixels near an edge.
        radius: how near, in pixels.
        ignore_index: class number of pixels that neither count nor make edges; None: all count.

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
        """Logits ``(n, c, h, w)`` and class numbers ``(n, h, w)`` to a scalar."""
        weights = 1 + edge_weights(target, self.factor, self.radius, self.ignore_index)
        counts, target = _counted(target, self.ignore_index)
        entropy = F.cross_entropy(logits, target, reduction="none")
        return (weights * entropy * counts).sum() / counts.sum().clamp(min=1)


class GeneralisedDice(nn.Module):
    """``1 - 2 * sum_c v_c sum(p * g) / sum_c v_c sum(p + g)``, ``v_c = 1 / clamp((sum g_c)^2, 1e-5)``.

    Per image, averaged (Sudre et al., DLMIA 2017, in RITnet's form). A class that an image lacks has the largest
    weight by far: predicting any of it costs nearly all of the image's loss.

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
        """Logits ``(n, c, h, w)`` and class numbers ``(n, h, w)`` to a scalar."""
        counts, target = _counted(target, self.ignore_index)
        truth = (F.one_hot(target, logits.shape[1]).movedim(-1, 1) * counts[:, None]).float().flatten(2)
        chance = (logits.float().softmax(1) * counts[:, None]).flatten(2)
        weights = 1 / truth.sum(2).square().clamp(min=self.smallest)
        common = (weights * (chance * truth).sum(2)).sum(1)
        both = (weights * (chance + truth).sum(2)).sum(1)
        return (1 - 2 * common / both.clamp(min=torch.finfo(both.dtype).tiny)).mean()


class SurfaceLoss(nn.Module):
    """Mean over pixels and classes of ``softmax_c * phi_c``, ``phi_c`` the signed distance to the class's boundary.

    The boundary loss of Kervadec et al. (MIDL 2019), as in RITnet: a wrong pixel costs more the further it is from
    where it belongs. It is negative where predictions are right, and has no use on its own: a class that an image
    lacks costs nothing.

    Args:
        ignore_index: class number of pixels that do not count; None: all count.

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
        """Logits and distances ``(n, c, h, w)`` and class numbers ``(n, h, w)`` to a scalar.

        Raises:
            ValueError: there are no distances, or they do not have the shape of the logits.
        """
        if distances is None or distances.shape != logits.shape:
            raise ValueError(_no_distances(logits, distances))
        counts, _ = _counted(target, self.ignore_index)
        each = (logits.float().softmax(1) * distances).mean(1)
        return (each * counts).sum() / counts.sum().clamp(min=1)


def _no_distances(logits: Tensor, found: Tensor | None) -> str:
    has = "has none" if found is None else f"has a tensor of shape {tuple(found.shape)}"
    return (
        f"the surface loss needs signed distances {tuple(logits.shape)} as third entry of the batch, which {has}: "
        "set distance_maps=true of the data (data.distance_maps=true on the command line); for your own dataset, "
        "lightning_prune.data.signed_distances makes them"
    )


def _counted(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Which pixels count, as numbers, and the class numbers with 0 for the others."""
    counts = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    return counts.float(), target.where(counts, 0)
