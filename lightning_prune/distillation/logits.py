"""Logits of a classification: their kind, usual temperature and shape, and the positions whose labels count."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

__all__ = [
    "Kind",
    "check_logits",
    "check_meaning",
    "kind_of",
    "mean_where",
    "usual_temperature",
    "valid_labels",
]

Kind = Literal["auto", "multiclass", "binary", "multilabel"]


def usual_temperature(logits: Tensor) -> float:
    """Return the usual temperature of soft targets: 1 for dense prediction, 4 for classification.

    Dense prediction has logits with positions, ``(n, classes, ...)``. There, a temperature of 4 makes the term, which
    is scaled by ``T^2``, larger than the task's loss, and its targets nearly uniform.

    Example:
        >>> import torch
        >>> usual_temperature(torch.zeros(2, 10)), usual_temperature(torch.zeros(2, 3, 8, 8))
        (4.0, 1.0)
    """
    return 1.0 if logits.dim() > 2 else 4.0


def kind_of(logits: Tensor, kind: Kind = "auto") -> Kind:
    """Return the kind of classification that logits encode; with ``"auto"`` by their channels.

    Args:
        logits: ``(n, channels, ...)``, or ``(n,)``.
        kind: ``"auto"``: ``"binary"`` for one channel or none, else ``"multiclass"``.

    Raises:
        ValueError: the kind is unknown, or ``"multiclass"`` with one channel, whose softmax is always 1.

    Example:
        >>> import torch
        >>> kind_of(torch.zeros(2, 1, 8, 8)), kind_of(torch.zeros(2, 3, 8, 8))
        ('binary', 'multiclass')
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
    single = logits.dim() < 2 or logits.shape[1] == 1
    if kind == "multiclass" and single:
        raise ValueError(
            f"the logits {tuple(logits.shape)} have one channel, and the softmax of one class is always 1: "
            "use kind='binary', or 'auto'"
        )
    if kind == "auto":
        return "binary" if single else "multiclass"
    return kind


def check_meaning(name: str, logits: Tensor, kind: Kind = "auto") -> None:
    """Raise ValueError if a loss has no meaning for logits of this shape and kind.

    Args:
        name: ``"hinton"``, ``"standardised"``, ``"cwd"`` or ``"dist"``.
        logits: ``(n, classes, ...)``; only the shape is used.
        kind: type of classification that the logits encode.

    Example:
        >>> import torch
        >>> check_meaning("cwd", torch.zeros(2, 1, 8, 8))
    """
    shape = tuple(logits.shape)
    if name in ("hinton", "dist"):
        kind_of(logits, kind)
    if name == "standardised" and (kind in ("binary", "multilabel") or len(shape) < 2 or shape[1] < 3):
        raise ValueError(
            f"standardised logits need at least three classes that exclude each other, the logits are {shape}, "
            f"kind={kind!r}: one or two standardised logits have no information but a sign; use hinton"
        )
    if name == "cwd" and len(shape) < 3:
        raise ValueError(
            f"cwd compares distributions over positions, and {shape} has none: use hinton, dist or standardised "
            "for classification"
        )


def check_logits(student: Tensor, teacher: Tensor, temperature: float) -> None:
    """Raise ValueError if the shapes of logits differ, or the temperature is not above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: they need "
            "the same classes and sizes"
        )


def valid_labels(target: Tensor, ignore_index: int, logits: Tensor) -> Tensor:
    """Return where ``target`` is not ignored, in the shape of the logits.

    Args:
        target: labels of the logits' shape, or without its channels.
        ignore_index: label that is left out.
        logits: ``(n, c, ...)``, or ``(n, ...)`` if they are binary.

    Raises:
        ValueError: the labels have other sizes.
    """
    valid = target != ignore_index
    if valid.numel() == logits.numel():
        return valid.reshape(logits.shape)
    if valid.numel() == logits[:, :1].numel():
        return valid.reshape(len(logits), 1, *logits.shape[2:]).expand(logits.shape)
    raise ValueError(
        f"labels {tuple(target.shape)} do not fit logits {tuple(logits.shape)}: they need the same batch and sizes"
    )


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values where the mask is true; 0 if it is nowhere."""
    return values.where(mask, 0).sum() / mask.sum().clamp(min=1)
