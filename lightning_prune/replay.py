"""Check by numbers that each operator of the smaller network does what the dense one did (level 3).

The rules *claim* which index of a result comes from which index of the operands. Here the claim is tried, one
operator at a time: random operands in the dense shapes, zero where something was removed, go through the dense
call; the same operands without what was removed go through the smaller one's call. The results must agree where
they survive. This knows nothing of the rules, so that a wrong rule shows, and nothing of the rest of the
network, so that activations with f(0) != 0 do no harm. Dimensions without channels are cropped: it costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.ids import Ids
from lightning_prune.recording import Call
from lightning_prune.tracker import Followed, Labels

__all__ = ["Mismatch", "mismatches"]

aten = torch.ops.aten
TOLERANCE = 1e-3
# Alike but for memory: which of them runs depends on strides.
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default}
_UNALIGNED = _VIEWS | {aten.as_strided_.default, aten.as_strided.default}


@dataclass(frozen=True)
class Mismatch:
    """An operator whose result is not the dense one's, restricted to what survives."""

    call: Call
    what: str


@dataclass
class Survival:
    """Which ids survive the cut, as a mask over ids."""

    alive: Tensor
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def kept(self, arrays: Sequence[Ids]) -> Tensor | None:
        """Mask over one dimension, None where everything stays."""
        masks = [self.alive[ids.clamp_max(len(self.alive) - 1)] | (ids >= len(self.alive)) for ids in arrays]
        both = torch.stack(masks).all(dim=0) if masks else None
        return None if both is None or bool(both.all()) else both

    def restrict(self, value: Tensor, labels: Labels) -> Tensor:
        """``value`` without what was removed."""
        for dim, arrays in enumerate(labels):
            if (mask := self.kept(arrays)) is not None:
                value = value.index_select(dim, mask.nonzero().flatten())
        return value

    def blank_(self, value: Tensor, labels: Labels) -> Tensor:
        """Zeros where something was removed."""
        for dim, arrays in enumerate(labels):
            if (mask := self.kept(arrays)) is not None:
                value.index_fill_(dim, (~mask).nonzero().flatten(), 0)
        return value

    def touches(self, followed: Followed) -> bool:
        """Whether anything that the operator reads or writes was removed."""
        return any(self.kept(arrays) is not None for labels in followed.labels for arrays in labels)


def mismatches(
    dense: Sequence[Followed], small: Sequence[Followed], alive: Tensor, mixed: Sequence[bool]
) -> Iterator[Mismatch]:
    """Compare both recordings operator by operator.

    Args:
        dense: what was followed in the dense network.
        small: what was followed in the smaller one.
        alive: mask over the dense network's ids.
        mixed: for each dense operator, whether it takes statistics across channels (then values may change).
    """
    survival = Survival(alive)
    for index, before, after in _pairs(dense, small):
        if not mixed[index] and survival.touches(before) and _checkable(before.call):
            if (what := _compare(before, after, survival)) is not None:
                yield Mismatch(after.call, what)


def _pairs(dense: Sequence[Followed], small: Sequence[Followed]) -> Iterator[tuple[int, Followed, Followed]]:
    """Operators of both networks that belong together, in order."""
    place = 0
    for index, before in enumerate(dense):
        for offset, after in enumerate(small[place : place + 3]):
            if _same(before.call, after.call):
                place += offset + 1
                yield index, before, after
                break


def _same(before: Call, after: Call) -> bool:
    place = (before.module, before.line) == (after.module, after.line)
    return place and before.op is after.op and len(before.tensors) == len(after.tensors)


def _checkable(call: Call) -> bool:
    return torch.Tag.nondeterministic_seeded not in call.op.tags and bool(call.outputs)


def _compare(before: Followed, after: Followed, survival: Survival) -> str | None:
    """Run both calls on the same numbers; what is wrong, or None."""
    full = [
        survival.blank_(_numbers(t, survival), labels) for t, labels in zip(*_operands(before), strict=True)
    ]
    cut = [survival.restrict(value, labels) for value, labels in zip(full, _operands(before)[1], strict=True)]
    for value, tensor in zip(cut, after.call.tensors, strict=True):
        if value.shape != tensor.shape:
            return f"reads {tuple(tensor.shape)} where {tuple(value.shape)} survive"
    wanted, found = _run(before.call, full), _run(after.call, cut)
    for want, have, labels in zip(wanted, found, before.labels[len(full) :], strict=True):
        if not any(labels) and want.shape != have.shape:
            continue  # nobody has said what this is; if it is read, the reader's operands will not fit
        if (what := _differ(survival.restrict(want, labels), have)) is not None:
            return what
    return None


def _operands(followed: Followed) -> tuple[list[Tensor], list[Labels]]:
    tensors = followed.call.tensors
    return tensors, followed.labels[: len(tensors)]


def _numbers(like: Tensor, survival: Survival) -> Tensor:
    """Random values of the same shape, dtype and memory order; zeros for integers, which may be indices."""
    shape, kind = tuple(like.shape), like.dtype
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    kind = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
    values = torch.rand(shape, generator=survival.generator, dtype=kind) + 0.1
    order = sorted(range(like.dim()), key=lambda dim: -like.stride(dim))
    back = [order.index(dim) for dim in range(like.dim())]
    return values.permute(order).contiguous().permute(back) if order else values


def _run(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The recorded call on other tensors."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    fresh = iter(tensors)
    leaves = [_plain(next(fresh).clone() if isinstance(leaf, Tensor) else leaf) for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    kwargs = {
        name: torch.device("cpu") if name == "device" and value else value for name, value in kwargs.items()
    }
    return [leaf for leaf in tree_flatten(call.op(*args, **kwargs))[0] if isinstance(leaf, Tensor)]


def _plain(leaf: Any) -> Any:
    return torch.float32 if leaf in (torch.float16, torch.bfloat16) else leaf


def _differ(want: Tensor, have: Tensor) -> str | None:
    if want.shape != have.shape:
        return f"gives {tuple(have.shape)} where {tuple(want.shape)} survive"
    if not want.numel() or not want.dtype.is_floating_point:
        return None
    scale = want.abs().nan_to_num().max().clamp_min(1e-6)
    error = (want - have).abs().nan_to_num().max() / scale
    return f"differs by {float(error):.2g} of its largest value" if error > TOLERANCE else None
