"""Distillation losses: functions of tensors of student and teacher that return a scalar.

Soft targets (Hinton et al., 2015), attention transfer (Zagoruyko & Komodakis, 2017), and the flow of the solution
procedure, FSP (Yim et al., 2017). Features are ``(n, c, ...)`` with one to three dimensions of positions. Half
precision is computed in single precision, because squares of features overflow in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Kind", "attention", "attention_map", "flow", "fsp", "hinton"]

Kind = Literal["multiclass", "binary", "multilabel"]
_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def hinton(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    kind: Kind = "multiclass",
    target: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Return ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over samples and pixels.

    The factor ``T^2`` keeps the size of the gradient independent of ``T`` (Hinton, Vinyals & Dean,
    arXiv 1503.02531, section 2). With ``"binary"`` and ``"multilabel"`` each logit is a Bernoulli distribution, and
    the mean is over the labels too.

    Args:
        student: logits ``(n, classes, ...)``; ``(n, ...)`` where ``kind`` is ``"binary"``.
        teacher: logits of the same shape.
        temperature: above 0, without unit; higher values give small probabilities more influence.
        kind: ``"multiclass"``: one class per pixel, softmax over dimension 1. ``"binary"`` and ``"multilabel"``:
            sigmoid of each logit.
        target: class numbers ``(n, ...)``, the logits' shape without the classes (``"multilabel"``: the logits'
            shape). Used for ``ignore_index`` only.
        ignore_index: positions where ``target`` has this number are left out. If all are, the loss is 0.

    Returns:
        A scalar in nats, at least 0; 0 where the logits are equal (up to a constant for ``"multiclass"``).

    Raises:
        ValueError: shapes differ, the temperature is not above 0, or the kind is unknown.

    Example: a student without preference and a teacher certain of one of two classes differ by log 2.

        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, torch.inf]]).clamp(max=50.0)
        >>> hinton(student, teacher, temperature=1.0)
        tensor(0.6931)
    """
    _check_logits(student, teacher, temperature, kind)
    student, teacher = _to_single(student) / temperature, _to_single(teacher) / temperature
    if kind == "multiclass":
        log_teacher, log_student = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    else:
        divergence = _bernoulli_term(teacher, student) + _bernoulli_term(-teacher, -student)
    if ignore_index is None or target is None:
        return temperature**2 * divergence.mean()
    return temperature**2 * _mean_where(divergence, target != ignore_index)


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
    power = _to_single(features).square().mean(1, keepdim=True)
    return F.normalize(_pool(power, size).flatten(1), dim=1)


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
    one, two = (_pool(_to_single(features), size).flatten(2) for features in (first, second))
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


def _pool(features: Tensor, size: torch.Size | tuple[int, ...] | None) -> Tensor:
    if size is None or tuple(features.shape[2:]) == tuple(size):
        return features
    return _POOL[len(size)](features, list(size))


def _to_single(features: Tensor) -> Tensor:
    """Return half-precision features in single precision, others unchanged."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def _bernoulli_term(teacher: Tensor, student: Tensor) -> Tensor:
    """Return one of the two terms of the divergence between Bernoulli distributions, from logits."""
    return teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values where the mask is true; 0 if it is nowhere."""
    if mask.shape != values.shape:
        mask = mask.reshape(values.shape)  # a (n, h, w) mask of (n, 1, h, w) logits
    return values.where(mask, 0).sum() / mask.sum().clamp(min=1)


def _check_logits(student: Tensor, teacher: Tensor, temperature: float, kind: str) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: they need "
            "the same classes and sizes"
        )
