"""Records of a trace: uses of sizes, reshapes, costs, and the operators with the labels of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.traced_int import PassedSize, TracedInt

__all__ = ["ContractionCost", "Labels", "RequiredMultiple", "SizeUse", "TracedOperator", "TracedReshape"]

#: For each dimension of a tensor, the id arrays along it.
Labels = tuple[tuple[Ids, ...], ...]


@dataclass(frozen=True)
class SizeUse:
    """A traced size, passed by the user's code, that must equal the number of ``ids`` that remain.

    Attributes:
        size: the size.
        ids: along the dimension of that size.
        where: the operator.
        others: further ids along the same dimension, an index of which survives if all its ids do.
    """

    size: TracedInt
    ids: Ids
    where: str
    others: tuple[Ids, ...] = ()


@dataclass(frozen=True)
class TracedReshape:
    """A reshape to sizes that were read from other tensors, with the shape and labels of its result."""

    passed: tuple[PassedSize, ...]
    shape: torch.Size
    labels: Labels
    where: str


@dataclass(frozen=True)
class RequiredMultiple:
    """Ids along a dimension whose size an operator requires to be a multiple of a number."""

    ids: Ids
    multiple: int
    where: str


@dataclass(frozen=True)
class ContractionCost:
    """Multiply-accumulates of one contraction: ``scale`` times the number of remaining ids of each factor.

    With ``after_values``, the scale may follow from values, such as a number of detections.
    """

    layer: str
    scale: int
    factors: tuple[Ids, ...]
    after_values: bool = False


@dataclass(frozen=True)
class TracedOperator:
    """An operator that was followed.

    Attributes:
        call: the recorded call.
        labels: those of its tensor arguments, then those of its results.
        shapes: of the arguments at the time of the call; surgery changes the tensors.
        mixes_channels: whether it takes statistics across channels, or gets numbers that count them.
        after_values: whether an operator before it in the same forward had a result whose size, or Python value,
            depends on values. In the smaller network sizes, numbers and branches may then differ.
        num_statistics: number of id arrays over which it takes statistics, or whose number it gets.
        counted: ids whose number, or something computed of it, the code passed to it as a number.
    """

    call: OperatorCall
    labels: list[Labels]
    shapes: list[torch.Size]
    mixes_channels: bool
    after_values: bool = False
    num_statistics: int = 0
    counted: tuple[Ids, ...] = ()

    @property
    def only_counts(self) -> bool:
        """Whether it mixes no channels but for the numbers that it gets."""
        return self.num_statistics == len(self.counted)
