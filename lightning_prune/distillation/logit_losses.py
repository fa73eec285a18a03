"""Distillation losses of logits: functions of the logits of student and teacher that return a scalar.

Soft targets (Hinton et al., 2015), standardised logits (Sun et al., 2024), channel-wise distillation (CWD, Shu et
al., 2021) and correlations (DIST, Huang et al., 2022). Logits are ``(n, classes, ...)``. Half precision is computed
in single precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.distillation.logits import (
    Kind,
    check_logits,
    check_meaning,
    kind_of,
    mean_where,
    usual_temperature,
    valid_labels,
)
from lightning_prune.distillation.losses import to_single

__all__ = ["cwd", "dist", "hinton", "standardised"]

CWD_TEMPERATURE = 4.0  # of the paper, for logits and for features
DIST_TEMPERATURE = 1.0  # of the paper, for segmentation and for ImageNet
STANDARDISED_TEMPERATURE = 2.0  # base temperature of the authors' commands
_LEAST_DEVIATION = 1e-4  # of logits, below which a position has no preference
_EPSILON = 1e-8  # of the authors of DIST: keeps the correlation of constants finite


def hinton(
    student: Tensor,
    teacher: Tensor,
    temperature: float | None = None,
    kind: Kind = "auto",
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
        temperature: above 0, without unit; higher values give small probabilities more influence. None:
            the usual one, 1 for logits with positions, 4 for classification.
        kind: ``"multiclass"``: one class per pixel, softmax over dimension 1. ``"binary"`` and ``"multilabel"``:
            sigmoid of each logit. ``"auto"``: ``"binary"`` if there is one channel, else ``"multiclass"``.
        target: class numbers ``(n, ...)``, the logits' shape without the classes (``"multilabel"``: the logits'
            shape). Used for ``ignore_index`` only.
        ignore_index: positions where ``target`` has this number are left out. If all are, the loss is 0.

    Returns:
        A scalar in nats, at least 0; 0 where the logits are equal (up to a constant for ``"multiclass"``).

    Raises:
        ValueError: shapes differ, the temperature is not above 0, or the kind is unknown, or ``"multiclass"`` with
            one channel.

    Example: a student without preference and a teacher certain of one of two classes differ by log 2.

        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, torch.inf]]).clamp(max=50.0)
        >>> hinton(student, teacher, temperature=1.0)
        tensor(0.6931)
    """
    temperature = usual_temperature(student) if temperature is None else temperature
    check_logits(student, teacher, temperature)
    student, teacher = to_single(student) / temperature, to_single(teacher) / temperature
    exclusive = kind_of(student, kind) == "multiclass"
    if exclusive:
        divergence = _softmax_divergence(student, teacher, 1)
    else:
        divergence = _bernoulli_term(teacher, student) + _bernoulli_term(-teacher, -student)
    if ignore_index is None or target is None:
        return temperature**2 * divergence.mean()
    valid = valid_labels(target, ignore_index, student)
    return temperature**2 * mean_where(divergence, valid[:, 0] if exclusive else valid)


def standardised(
    student: Tensor,
    teacher: Tensor,
    temperature: float = STANDARDISED_TEMPERATURE,
    target: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Return :func:`hinton` of logits that were standardised over the classes: mean 0, deviation 1.

    Logit standardization (Sun et al., CVPR 2024, arXiv 2403.01427): ``Z(x) = (x - mean(x)) / std(x)``. The student
    learns the order of the classes and their relative distances, and not the size of the teacher's logits, which a
    small network may be unable to reach. The deviation divides by the number of classes, as in the paper; the code
    of its authors divides by one less, which is another temperature.

    Args:
        student: logits ``(n, classes, ...)`` of at least three classes that exclude each other.
        teacher: logits of the same shape.
        temperature: above 0.
        target: class numbers ``(n, ...)``, used for ``ignore_index`` only.
        ignore_index: positions where ``target`` has this number are left out. If all are, the loss is 0.

    Returns:
        A scalar in nats, at least 0; unchanged if the logits of a position are multiplied by a positive number or
        shifted.

    Raises:
        ValueError: shapes differ, the temperature is not above 0, or there are fewer than three classes: two
            standardised logits are always 1 and -1.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 5.0]])
        >>> bool(standardised(3 * x + 2, x) < 1e-6), bool(standardised(-x, x) > 1)
        (True, True)
    """
    check_meaning("standardised", student)
    return hinton(
        _standardise(student), _standardise(teacher), temperature, "multiclass", target, ignore_index
    )


def cwd(
    student: Tensor,
    teacher: Tensor,
    temperature: float = CWD_TEMPERATURE,
    target: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Return the divergence of each channel's distribution over the positions, mean over samples and channels.

    Channel-wise knowledge distillation (Shu et al., ICCV 2021, arXiv 2011.13256):
    ``T^2 / C * sum_c KL(softmax(teacher_c / T) || softmax(student_c / T))``, where the softmax is over the positions
    of channel ``c``. It compares where a class or a feature is. Positions where the teacher's channel is strong have
    a large weight, those where it is weak, the background, have little influence.

    Args:
        student: logits or features ``(n, c, ...)`` with at least one dimension of positions.
        teacher: of the same shape.
        temperature: above 0.
        target: class numbers ``(n, ...)``, or ``(n, c, ...)`` for several labels; used for ``ignore_index`` only.
        ignore_index: positions where ``target`` has this number are left out of both distributions.

    Returns:
        A scalar in nats, at least 0; unchanged if a constant is added to a channel.

    Raises:
        ValueError: shapes differ, the temperature is not above 0, or there are no positions.

    Example: one channel whose teacher points to the first of two positions.

        >>> cwd(torch.zeros(1, 1, 2), torch.tensor([[[50.0, 0.0]]]), temperature=1.0)
        tensor(0.6931)
    """
    check_logits(student, teacher, temperature)
    check_meaning("cwd", student)
    ours, theirs = ((to_single(x) / temperature).flatten(2) for x in (student, teacher))
    if ignore_index is None or target is None:
        return temperature**2 * _softmax_divergence(ours, theirs, 2).mean()
    valid = valid_labels(target, ignore_index, student).flatten(2)
    lowest = torch.finfo(ours.dtype).min  # not -inf: two infinities have no difference
    divergence = _softmax_divergence(ours.where(valid, lowest), theirs.where(valid, lowest), 2)
    return temperature**2 * mean_where(divergence, valid.any(2))


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float = DIST_TEMPERATURE,
    kind: Kind = "auto",
    target: Tensor | None = None,
    ignore_index: int | None = None,
    between: float = 1.0,
    within: float = 1.0,
) -> Tensor:
    """Return one minus the correlation of the probabilities, between classes and within them.

    DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536): with the probabilities of rows (samples, or pixels of all
    samples) and columns (classes), ``T^2 * (between * (1 - rho of rows) + within * (1 - rho of columns))``, where
    ``rho`` is Pearson's correlation of a row, or column, of the student with that of the teacher; means over rows
    and columns. A student need not reach the teacher's confidence, only its preferences.

    Args:
        student: logits ``(n, classes, ...)``, or ``(n, ...)`` where ``kind`` is ``"binary"``.
        teacher: logits of the same shape.
        temperature: above 0.
        kind: as for :func:`hinton`. With one channel only the correlation within it is used: a single value
            correlates with nothing.
        target: class numbers ``(n, ...)``, or of the logits' shape; used for ``ignore_index`` only.
        ignore_index: rows where ``target`` has this number are left out. If all are, the loss is 0.
        between: weight of the correlation between the classes of a row.
        within: weight of the correlation within a class, over the rows.

    Returns:
        A scalar in ``[0, 2 * (between + within) * T^2]``; unchanged if the probabilities of all rows are scaled and
        shifted alike.

    Raises:
        ValueError: shapes differ, the temperature is not above 0, or the kind is unknown.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
        >>> bool(dist(x, x) < 1e-4), bool(dist(x.flip(0), x) > 1)
        (True, True)
    """
    check_logits(student, teacher, temperature)
    kind = kind_of(student, kind)
    student, teacher = (_with_channels(x, kind) for x in (student, teacher))
    ours, theirs = (_probability_rows(x, temperature, kind) for x in (student, teacher))
    valid = torch.ones_like(ours, dtype=torch.bool)
    if ignore_index is not None and target is not None:
        valid = _rows(valid_labels(target, ignore_index, student))
    loss = within * _uncorrelated(ours, theirs, valid, 0)
    if ours.shape[1] > 1:
        loss = loss + between * _uncorrelated(ours, theirs, valid, 1)
    return temperature**2 * loss


def _softmax_divergence(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Return ``KL(softmax(teacher) || softmax(student))`` along a dimension."""
    log_teacher, log_student = F.log_softmax(teacher, dim), F.log_softmax(student, dim)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim)


def _bernoulli_term(teacher: Tensor, student: Tensor) -> Tensor:
    """Return one of the two terms of the divergence between Bernoulli distributions, from logits."""
    return teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))


def _standardise(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and deviation 1 over dimension 1; equal logits become 0."""
    logits = to_single(logits)
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    # The clamp, unlike a sum, leaves the result independent of the scale; gradients of equal logits stay finite.
    return centred * variance.clamp(min=_LEAST_DEVIATION**2).rsqrt()


def _with_channels(logits: Tensor, kind: Kind) -> Tensor:
    """Return logits with a dimension of channels, which binary logits may lack."""
    return logits[:, None] if logits.dim() == 1 or (kind == "binary" and logits.shape[1] != 1) else logits


def _rows(values: Tensor) -> Tensor:
    """Return ``(n, c, ...)`` as ``(n * positions, c)``."""
    return values.movedim(1, -1).flatten(0, -2)


def _probability_rows(logits: Tensor, temperature: float, kind: Kind) -> Tensor:
    """Return the probabilities of each sample and position: ``(rows, channels)``."""
    rows = _rows(to_single(logits)) / temperature
    return rows.softmax(1) if kind == "multiclass" else rows.sigmoid()


def _uncorrelated(ours: Tensor, theirs: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return the mean of ``1 - rho`` along ``dim``, over the valid entries; 0 if there are none."""
    number = valid.sum(dim, keepdim=True)
    one, other = (_centred(x, valid, number, dim) for x in (ours, theirs))
    lengths = one.norm(dim=dim) * other.norm(dim=dim)
    rho = (one * other).sum(dim) / (lengths + _EPSILON)
    return mean_where(1 - rho, number.squeeze(dim) > 0)


def _centred(values: Tensor, valid: Tensor, number: Tensor, dim: int) -> Tensor:
    """Return valid values minus their mean along a dimension, and 0 elsewhere."""
    mean = values.where(valid, 0).sum(dim, keepdim=True) / number.clamp(min=1)
    return (values - mean).where(valid, 0)
