"""Distillation losses of features: functions of features of student and teacher that return a scalar.

Attention transfer (Zagoruyko & Komodakis, 2017), and the flow of the solution procedure, FSP (Yim et al., 2017).
Features are ``(n, c, ...)`` with one to three dimensions of positions. Half precision is computed in single
precision, because squares of features overflow in float16. The losses of logits are in
:mod:`~lightning_prune.distillation.logit_losses`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention", "attention_map", "flow", "fsp"]

_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``mean (a_student - a_teacher)^2`` of the two :func:`attention_map`.

    Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928) in the form of its code. The numbers of channels
    may differ; maps of different sizes are pooled to the smaller size in each direction.

    Args:
        student: features ``(n, c, ...)``.
        teacher: features ``(n, any c, ...)`` with as many dimensions.

    Returns:
        A scalar in ``[0, 2 / positions]``. It is small for maps of many pixels, which is why its usual weight
        is 1000.

    Raises:
        ValueError: the sizes cannot be pooled to each other.

    Example:
        >>> attention(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0], [0.0, 4.0]]]))
        tensor(1.)
    """
    size = common_size(student, teacher)
    return mean_square(attention_map(student, size), attention_map(teacher, size))


def fsp(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``mean (G_student - G_teacher)^2`` of the two :func:`flow` matrices between a pair of layers.

    Flow of the solution procedure (Yim et al., CVPR 2017). Student and teacher must have the same channels in the
    same order.

    Args:
        student: features of two layers, ``(n, c1, ...)`` and ``(n, c2, ...)``.
        teacher: the teacher's features of two layers, with as many channels; sizes may differ.

    Returns:
        A scalar, at least 0, in the fourth power of the features' unit.

    Raises:
        ValueError: the numbers of channels differ, or two sizes cannot be pooled to each other.

    Example:
        >>> x = torch.ones(1, 2, 4)
        >>> fsp((x, x), (2 * x, x))
        tensor(1.)
    """
    ours, theirs = flow(*student), flow(*teacher)
    if theirs.shape != ours.shape:
        raise ValueError(
            f"student and teacher must have the same channels: the student's flow is {tuple(ours.shape[1:])}, "
            f"the teacher's {tuple(theirs.shape[1:])}; slice or project one of them first"
        )
    return mean_square(ours, theirs)


def attention_map(features: Tensor, size: torch.Size | tuple[int, ...] | None = None) -> Tensor:
    """Return the attention map of a layer: the mean square over channels, normalised to length 1 per sample.

    Args:
        features: ``(n, c, ...)``.
        size: size to which the map is pooled (mean) before it is normalised; None: no pooling.

    Returns:
        ``(n, positions)``, at least 0.

    Example:
        >>> attention_map(torch.tensor([[[3.0, 0.0], [0.0, 3.0]]]))
        tensor([[0.7071, 0.7071]])
    """
    power = to_single(features).square().mean(1, keepdim=True)
    return F.normalize(pool(power, size).flatten(1), dim=1)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Return the FSP matrix of two layers: ``G_ij``, the mean over positions of ``first_i * second_j``.

    Features of different sizes are pooled (mean) to the smaller size in each direction.

    Args:
        first: features ``(n, c1, ...)``.
        second: features ``(n, c2, ...)``.

    Returns:
        ``(n, c1, c2)``.

    Example:
        >>> flow(torch.ones(1, 1, 4, 4), 3 * torch.ones(1, 2, 2, 2))
        tensor([[[3., 3.]]])
    """
    size = common_size(first, second)
    one, two = (pool(to_single(features), size).flatten(2) for features in (first, second))
    return one @ two.mT / one.shape[-1]


def common_size(one: Tensor, other: Tensor) -> tuple[int, ...]:
    """Return the smaller number of positions in each direction.

    Raises:
        ValueError: the batches differ, or one tensor has maps where the other has tokens.
    """
    if one.dim() != other.dim() or len(one) != len(other) or one.dim() < 3 or one.dim() > 5:
        raise ValueError(
            f"features {tuple(one.shape)} and {tuple(other.shape)} cannot be pooled to each other: they need "
            "the same batch and the same number (1 to 3) of dimensions after the channels"
        )
    return tuple(min(a, b) for a, b in zip(one.shape[2:], other.shape[2:], strict=True))


def mean_square(one: Tensor, other: Tensor) -> Tensor:
    """Return ``mean (one - other)^2``."""
    return F.mse_loss(one, other)


def pool(features: Tensor, size: torch.Size | tuple[int, ...] | None) -> Tensor:
    """Pool features (mean) to a size; None: leave them as they are."""
    if size is None or tuple(features.shape[2:]) == tuple(size):
        return features
    return _POOL[len(size)](features, list(size))


def to_single(features: Tensor) -> Tensor:
    """Return half-precision features in single precision, others unchanged."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
