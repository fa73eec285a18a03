"""An operator as a function of how many channels stay, so that it can be run alone (level 3).

Fixed sizes are numbers, and those that shrink are axes. Two operators that differ in their channel counts only have
the same :attr:`Operator.signature`, before and after any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import TreeSpec, tree_unflatten

from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.operator_sets import CONVOLUTIONS

__all__ = ["Operator", "Size", "Slot", "contracts", "numbers"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Size:
    """A size that shrinks: of ``dense`` entries those stay that survive along each of the ``axes``.

    Example:
        >>> Size(8, (0,))([5]), Size(64, (0, 1))([4, 8], (8, 16)), Size(16, (0,), times=2)([5])
        (5, 16, 10)
    """

    dense: int
    axes: tuple[int, ...]
    times: int = 1

    def __call__(self, counts: Sequence[int], most: Sequence[int] = ()) -> int:
        """The size where ``counts`` of each axis stay, of ``most``."""
        if len(self.axes) == 1:
            return counts[self.axes[0]] * self.times
        return max(1, round(self.dense * prod(counts[axis] / most[axis] for axis in self.axes)))

    def __str__(self) -> str:
        return "*".join(LETTERS[axis % 26] for axis in self.axes) + (
            f"*{self.times}" if self.times > 1 else ""
        )


@dataclass(frozen=True)
class Slot:
    """A tensor argument: its sizes, its dimensions in the order of memory, whether it is a parameter or buffer."""

    sizes: tuple[int | Size, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    held: bool = False

    def __str__(self) -> str:
        strided = "" if self.order == tuple(range(len(self.order))) else f"@{list(self.order)}"
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.sizes))}]{strided}"


@dataclass(eq=False)
class Operator:
    """One recorded operator, to be run with any number of channels.

    Attributes:
        op: the ATen operator.
        module: that called it.
        layer: the weight it contracts with, or the module; what costs are booked to.
        leaves: its arguments, flat, with slots in the place of tensors.
        spec: how they are nested.
        factors: units of each axis.
        outputs: sizes of its results.
        steps: what the count of each axis must be a multiple of.
        source: whose result its first tensor is.
    """

    op: OpOverload
    module: str
    layer: str
    leaves: list[Any]
    spec: TreeSpec
    factors: list[Units]
    outputs: list[tuple[int | Size, ...]]
    steps: list[int] = field(default_factory=list)
    source: Operator | None = None

    @property
    def most(self) -> tuple[int, ...]:
        """The count of each axis in the network as it was traced."""
        return tuple(len(factor) for factor in self.factors)

    @property
    def multiples(self) -> tuple[int, ...]:
        """Of each axis: none makes a difference."""
        return (1,) * len(self.factors)

    @cached_property
    def slots(self) -> list[Slot]:
        """Its tensor arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Slot)]

    @cached_property
    def signature(self) -> str:
        """What it is, without how many channels there are."""
        return f"{self.op.name()}({', '.join(map(str, self.leaves))})"

    @property
    def contracts(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return contracts(self.op)

    @property
    def on_grid(self) -> bool:
        """Whether its cost is looked up by its axes; otherwise by its :meth:`volume`."""
        merged = any(isinstance(s, Size) and len(s.axes) > 1 for slot in self.slots for s in slot.sizes)
        return len(self.factors) <= 2 and not merged

    def size(self, size: int | Size, counts: Sequence[int]) -> int:
        """One size where ``counts`` stay."""
        return size(counts, self.most) if isinstance(size, Size) else size

    def volume(self, counts: Sequence[int]) -> int:
        """How much it has to do, roughly: multiplications of a product of two tensors, else entries moved."""
        shapes = [
            [self.size(s, counts) for s in sizes] for sizes in [*(s.sizes for s in self.slots), *self.outputs]
        ]
        numels = [prod(shape) for shape in shapes]
        if self.op._opname in ("mm", "bmm") and len(numels) == 3:
            return round(prod(map(float, numels)) ** 0.5)
        return sum(numels)

    def arguments(self, counts: Sequence[int], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for ``counts`` channels along each axis: random numbers, zeros where whole numbers are wanted."""
        leaves = [self._leaf(leaf, counts, device) for leaf in self.leaves]
        found: tuple[list[Any], dict[str, Any]] = tree_unflatten(leaves, self.spec)
        return found

    def run(self, counts: Sequence[int], device: torch.device) -> Callable[[], object]:
        """What runs it once with ``counts`` channels along each axis, eagerly."""
        args, kwargs = self.arguments(counts, device)
        return partial(self.op, *args, **kwargs)

    def share(self, counts: Sequence[int], device: torch.device) -> float:
        """Share of a run's time that it also takes within a network: all of it."""
        return 1.0

    def parameters(self, counts: Sequence[int]) -> int:
        """How many entries the parameters have that it reads."""
        held = (slot for slot in self.slots if slot.held)
        return sum(prod(self.size(size, counts) for size in slot.sizes) for slot in held)

    def _leaf(self, leaf: Any, counts: Sequence[int], device: torch.device) -> Any:
        if isinstance(leaf, Slot):
            shape = [self.size(size, counts) for size in leaf.sizes]
            return numbers(shape, leaf.order, leaf.dtype, device)
        if isinstance(leaf, Size):
            return self.size(leaf, counts)
        return device if isinstance(leaf, torch.device) else leaf


def numbers(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers in [1, 2), or zeros of other types, with dimensions in a given order of memory."""
    stored = [shape[dim] for dim in order]
    floats = dtype.is_floating_point
    held = (
        torch.rand(stored, device=device).add_(1).to(dtype)
        if floats
        else torch.zeros(stored, dtype=dtype, device=device)
    )
    return held.permute([order.index(dim) for dim in range(len(order))]) if order else held


def contracts(op: OpOverload) -> bool:
    """Whether it is a convolution or a matrix product."""
    return op._opname in {*CONVOLUTIONS, "mm", "addmm", "bmm", "baddbmm"}
