"""An operator as a function of its channel counts, so that it can be run alone.

Sizes that never change are numbers; sizes that shrink are :class:`Size` objects over the operator's axes. Two
operators that differ only in their channel counts have the same :attr:`Operator.signature`, before and after any cut.
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

__all__ = ["Operator", "Size", "Slot", "is_contraction", "random_tensor"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Size:
    """A size that shrinks with the counts of one or several axes.

    Attributes:
        dense: the size before any cut.
        axes: indices of the axes; with several, the size shrinks by the product of their shares.
        times: with one axis, the size is its count times this number.

    Example:
        >>> Size(8, (0,))([5]), Size(64, (0, 1))([4, 8], (8, 16)), Size(16, (0,), times=2)([5])
        (5, 16, 10)
    """

    dense: int
    axes: tuple[int, ...]
    times: int = 1

    def __call__(self, counts: Sequence[int], dense_counts: Sequence[int] = ()) -> int:
        """Return the size where ``counts`` of the ``dense_counts`` channels of each axis are kept."""
        if len(self.axes) == 1:
            return counts[self.axes[0]] * self.times
        return max(1, round(self.dense * prod(counts[axis] / dense_counts[axis] for axis in self.axes)))

    def __str__(self) -> str:
        letters = "*".join(LETTERS[axis % 26] for axis in self.axes)
        return f"{letters}*{self.times}" if self.times > 1 else letters


@dataclass(frozen=True)
class Slot:
    """A tensor argument of an operator.

    Attributes:
        sizes: of its dimensions.
        dtype: of its elements.
        order: its dimensions in the order of memory, the largest stride first.
        is_parameter: whether it is a parameter or buffer.
    """

    sizes: tuple[int | Size, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    is_parameter: bool = False

    def __str__(self) -> str:
        strides = "" if self.order == tuple(range(len(self.order))) else f"@{list(self.order)}"
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.sizes))}]{strides}"


@dataclass(eq=False)
class Operator:
    """A traced operator that can be run with any number of channels.

    Attributes:
        op: the ATen operator.
        module: that called it.
        layer: the weight that it contracts with, otherwise the module; costs are added to it.
        leaves: its arguments, flattened, with a :class:`Slot` for each tensor.
        spec: structure to restore the arguments from ``leaves``.
        factors: units of each axis.
        outputs: sizes of its results.
        steps: for each axis, a number that its counts must be a multiple of.
        source: operator whose result is the first tensor argument, None for an input of the network.
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
    def dense_counts(self) -> tuple[int, ...]:
        """Count of each axis in the network as it was traced."""
        return tuple(len(factor) for factor in self.factors)

    @property
    def multiples(self) -> tuple[int, ...]:
        """For each axis 1: all counts are run by the same algorithm."""
        return (1,) * len(self.factors)

    @cached_property
    def slots(self) -> list[Slot]:
        """The tensor arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Slot)]

    @cached_property
    def signature(self) -> str:
        """Operator and arguments as text, without the numbers of channels."""
        return f"{self.op.name()}({', '.join(map(str, self.leaves))})"

    @property
    def is_contraction(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return is_contraction(self.op)

    @property
    def on_grid(self) -> bool:
        """Whether its time is looked up by the counts of its axes; otherwise by its :meth:`volume`."""
        merged = any(isinstance(s, Size) and len(s.axes) > 1 for slot in self.slots for s in slot.sizes)
        return len(self.factors) <= 2 and not merged

    def size(self, size: int | Size, counts: Sequence[int]) -> int:
        """Return a size as a number, with ``counts`` channels along each axis."""
        return size(counts, self.dense_counts) if isinstance(size, Size) else size

    def volume(self, counts: Sequence[int]) -> int:
        """Return a rough number of operations: multiplications of a matrix product, otherwise elements moved."""
        tensors = [*(slot.sizes for slot in self.slots), *self.outputs]
        numels = [prod(self.size(size, counts) for size in sizes) for sizes in tensors]
        if self.op._opname in ("mm", "bmm") and len(numels) == 3:
            # (m*k * k*n * m*n) ** 0.5 is m*k*n
            return round(prod(map(float, numels)) ** 0.5)
        return sum(numels)

    def arguments(self, counts: Sequence[int], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments for ``counts`` channels along each axis.

        Tensors of floats hold random numbers, others zeros.
        """
        leaves = [self._argument(leaf, counts, device) for leaf in self.leaves]
        arguments: tuple[list[Any], dict[str, Any]] = tree_unflatten(leaves, self.spec)
        return arguments

    def make_call(self, counts: Sequence[int], device: torch.device) -> Callable[[], object]:
        """Return a call that runs it once, eagerly, with ``counts`` channels along each axis."""
        args, kwargs = self.arguments(counts, device)
        return partial(self.op, *args, **kwargs)

    def own_share(self, counts: Sequence[int], device: torch.device) -> float:
        """Return the share of its time alone that it also takes within a network: all of it."""
        return 1.0

    def parameters(self, counts: Sequence[int]) -> int:
        """Return the number of elements of the parameters that it reads."""
        parameters = (slot for slot in self.slots if slot.is_parameter)
        return sum(prod(self.size(size, counts) for size in slot.sizes) for slot in parameters)

    def _argument(self, leaf: Any, counts: Sequence[int], device: torch.device) -> Any:
        if isinstance(leaf, Slot):
            shape = [self.size(size, counts) for size in leaf.sizes]
            return random_tensor(shape, leaf.order, leaf.dtype, device)
        if isinstance(leaf, Size):
            return self.size(leaf, counts)
        return device if isinstance(leaf, torch.device) else leaf


def random_tensor(
    shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return random floats in [1, 2), or zeros of another type.

    Args:
        shape: of the tensor.
        order: its dimensions in the order of memory.
        dtype: of its elements.
        device: that holds it.
    """
    stored_shape = [shape[dim] for dim in order]
    if dtype.is_floating_point:
        stored = torch.rand(stored_shape, device=device).add_(1).to(dtype)
    else:
        stored = torch.zeros(stored_shape, dtype=dtype, device=device)
    return stored.permute([order.index(dim) for dim in range(len(order))]) if order else stored


def is_contraction(op: OpOverload) -> bool:
    """Return whether an ATen operator is a convolution or a matrix product."""
    return op._opname in {*CONVOLUTIONS, "mm", "addmm", "bmm", "baddbmm"}
