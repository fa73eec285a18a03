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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.surgery.mask_check import fits
from lightning_prune.surgery.masks import Mask
from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["mismatches"]

aten = torch.ops.aten
TOLERANCE = 1e-3
# Alike but for memory: which of them runs depends on strides.
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default}
_NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "rms_norm", "_fused_rms_norm")
# Their values say nothing.
_ARBITRARY = {
    aten.empty_like.default,
    aten.new_empty.default,
    aten.as_strided.default,
    aten.as_strided_.default,
}


@dataclass
class _Survival:
    """Which ids survive the cut, as a mask over the dense network's."""

    alive: NDArray[np.bool_]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self._masks: dict[int, tuple[Ids, Mask]] = {}  # by identity: the same ids run through many operators

    def mask(self, arrays: Sequence[Ids]) -> Mask:
        """What survives along one dimension, None where everything stays."""
        masks = [mask for ids in arrays if (mask := self._mask(ids)) is not None]
        return masks[0] if len(masks) == 1 else np.logical_and.reduce(masks) if masks else None

    def _mask(self, ids: Ids) -> Mask:
        if id(ids) not in self._masks:
            mask = self.alive[ids.numpy()]
            self._masks[id(ids)] = ids, None if mask.all() else mask
        return self._masks[id(ids)][1]

    def masks(self, labels: Sequence[Labels]) -> list[list[Mask]]:
        """What survives of each tensor along each dimension."""
        return [[self.mask(arrays) for arrays in known] for known in labels]

    def kept(self, arrays: Sequence[Ids]) -> Tensor | None:
        """Surviving indices of one dimension, None where everything stays."""
        mask = self.mask(arrays)
        return None if mask is None else torch.from_numpy(np.flatnonzero(mask))

    def restrict(self, value: Tensor, labels: Labels) -> Tensor:
        """``value`` without what was removed."""
        for dim, arrays in enumerate(labels):
            if (stays := self.kept(arrays)) is not None:
                value = value.index_select(dim, stays)
        return value

    def numbers(self, shape: Sequence[int], kind: torch.dtype, labels: Labels) -> Tensor:
        """Random values, zero where something was removed; zeros for integers, which may be indices."""
        if not kind.is_floating_point:
            return torch.zeros(list(shape), dtype=kind)
        values = torch.rand(list(shape), generator=self.generator, dtype=_wide(kind)) + 0.1
        for dim, arrays in enumerate(labels):
            if (stays := self.kept(arrays)) is not None:
                gone = torch.ones(shape[dim], dtype=torch.bool).index_fill_(0, stays, False)
                values.index_fill_(dim, gone.nonzero().flatten(), 0)
        return values

    def touches(self, followed: TracedOperator) -> bool:
        """Whether anything that the operator reads or writes was removed."""
        return any(self.mask(arrays) is not None for labels in followed.labels for arrays in labels)


def mismatches(
    dense: Sequence[TracedOperator], small: Sequence[TracedOperator], alive: NDArray[np.bool_]
) -> Iterator[tuple[TracedOperator, str]]:
    """Every operator whose result is not the dense one's, restricted to what survives, and what is wrong.

    Args:
        dense: what was followed in the dense network.
        small: what was followed in the smaller one.
        alive: mask over the dense network's ids.
    """
    survival = _Survival(alive)
    for before, after in _pairs(dense, small):
        if not survival.touches(before) or not _telling(before.call):
            continue
        check = _blanked(before, survival) if before.mixed else _compare(before, after, survival)
        if (what := check) is not None:
            yield before, what


def _pairs(
    dense: Sequence[TracedOperator], small: Sequence[TracedOperator]
) -> Iterator[tuple[TracedOperator, TracedOperator]]:
    """Operators of both networks that belong together, in order.

    Where torch takes another way inside one line of the network's code, because a dimension has one element
    left, that line cannot be compared.
    """
    places = _by_place(dense), _by_place(small)
    for place, before in places[0].items():
        after = places[1].get(place, [])
        if [_kind(followed.call) for followed in before] == [_kind(followed.call) for followed in after]:
            yield from zip(before, after, strict=True)


def _by_place(followed: Sequence[TracedOperator]) -> dict[tuple[str, str], list[TracedOperator]]:
    places: dict[tuple[str, str], list[TracedOperator]] = {}
    for each in followed:
        if each.call.op is not aten.clone.default:  # whether a copy is needed depends on strides
            places.setdefault((each.call.module, each.call.line), []).append(each)
    return places


def _kind(call: OperatorCall) -> tuple[Any, int]:
    return ("reshape" if call.op in _RESHAPES else call.op), len(call.tensors)


def _telling(call: OperatorCall) -> bool:
    seeded = torch.Tag.nondeterministic_seeded in call.op.tags
    return bool(call.tensors and call.outputs) and not seeded and call.op not in _ARBITRARY


def _compare(before: TracedOperator, after: TracedOperator, survival: _Survival) -> str | None:
    """What is wrong with the smaller call, or None."""
    count = len(before.shapes)
    operands, results = before.labels[:count], before.labels[count:]
    for shape, small, known in zip(before.shapes, after.shapes, operands, strict=True):
        if (what := _misfit(shape, small, known, survival)) is not None:
            return what
    if fits(before, after, survival.masks(operands), survival.masks(results)):
        return None
    return _by_numbers(before, after, survival)


def _by_numbers(before: TracedOperator, after: TracedOperator, survival: _Survival) -> str | None:
    """Run both calls on the same numbers."""
    labels, kinds = before.labels[: len(before.shapes)], [tensor.dtype for tensor in before.call.tensors]
    shapes = _cropped(before, labels)
    full = [survival.numbers(*each) for each in zip(shapes, kinds, labels, strict=True)]
    try:
        wanted = _run(before.call, full)
    except (RuntimeError, NotImplementedError):
        return None  # not an operator for such numbers, or for this device
    cut = [survival.restrict(value, known) for value, known in zip(full, labels, strict=True)]
    return _judge(wanted, after.call, cut, before.labels[len(labels) :], survival)


def _blanked(before: TracedOperator, survival: _Survival) -> str | None:
    """Statistics across channels change with the cut; but a norm whose removed parameters are zero must give zero
    there, and nowhere else."""
    count = len(before.shapes)
    labels = [before.labels[0][:0] if i == 0 else known for i, known in enumerate(before.labels[:count])]
    removed = any(survival.kept(arrays) is not None for known in labels for arrays in known)
    if before.call.op._opname not in _NORMS or not removed:
        return None
    kinds = [tensor.dtype for tensor in before.call.tensors]
    try:
        out = _run(
            before.call, [survival.numbers(*each) for each in zip(before.shapes, kinds, labels, strict=True)]
        )[0]
    except (RuntimeError, NotImplementedError):
        return None
    alive = survival.restrict(out, _scaled(before, before.labels[count]))
    zeros, missing = int((out == 0).sum()), out.numel() - alive.numel()
    return None if zeros == missing and bool((alive != 0).all()) else "scales other channels than its own"


def _scaled(norm: TracedOperator, labels: Labels) -> Labels:
    """The labels of a norm's result along the dimensions that its parameters run along."""
    rank = len(labels)
    layer = norm.call.op._opname not in ("native_batch_norm", "native_group_norm")
    dims = range(rank - len(norm.call.args[1]), rank) if layer else [1]
    return tuple(arrays if dim in dims else () for dim, arrays in enumerate(labels))


def _misfit(shape: torch.Size, small: torch.Size, labels: Labels, survival: _Survival) -> str | None:
    survive = [
        size if (mask := survival.mask(arrays)) is None else int(mask.sum())
        for size, arrays in zip(shape, labels, strict=True)
    ]
    return None if survive == list(small) else f"reads {tuple(small)} where {tuple(survive)} survive"


def _judge(
    wanted: list[Tensor],
    call: OperatorCall,
    operands: list[Tensor],
    labels: Sequence[Labels],
    survival: _Survival,
) -> str | None:
    try:
        found = _run(call, operands)
    except RuntimeError as error:
        return f"cannot read what survives: {error}"
    for want, have, known in zip(wanted, found, labels, strict=False):
        if not any(known) and want.shape != have.shape:
            continue  # nobody has said what this is; where it is read, the reader's operands will not fit
        if (what := _differ(survival.restrict(want, known), have)) is not None:
            return what
    return None


def _differ(want: Tensor, have: Tensor) -> str | None:
    if want.shape != have.shape:
        return f"gives {tuple(have.shape)} where {tuple(want.shape)} survive"
    if not want.numel() or not want.dtype.is_floating_point:
        return None
    scale = want.abs().nan_to_num().max().clamp_min(1e-6)
    error = float((want - have).abs().nan_to_num().max() / scale)
    return f"is off by {error:.2g} of its largest value" if error > TOLERANCE else None


def _run(call: OperatorCall, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The recorded call on other tensors, on the CPU."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    fresh = iter(tensors)
    leaves = [next(fresh).clone() if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    operator = aten.reshape.default if call.op in _RESHAPES else call.op
    with torch.no_grad():
        results = tree_flatten(operator(*args, **kwargs))[0]
    return [leaf for leaf in results if isinstance(leaf, Tensor)]


def _wide(kind: torch.dtype) -> torch.dtype:
    return torch.float32 if kind in (torch.float16, torch.bfloat16) else kind


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return _wide(leaf)
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _cropped(followed: TracedOperator, labels: Sequence[Labels]) -> list[list[int]]:
    """The operands' shapes, small along dimensions that carry no channels, where the operator allows it."""
    call, shapes = followed.call, [list(shape) for shape in followed.shapes]
    name = call.op._opname
    if name == "convolution":
        _crop_convolution(call, labels, shapes)
    elif name in ("mm", "addmm") and not labels[-2][0] and (name == "mm" or len(shapes[0]) < 2):
        shapes[-2][0] = min(shapes[-2][0], 4)
    elif torch.Tag.pointwise in call.op.tags or name in ("cat", "native_batch_norm"):
        _crop_alike(labels, shapes, call.args[1] if name == "cat" and len(call.args) > 1 else None)
    return shapes


def _crop_convolution(call: OperatorCall, labels: Sequence[Labels], shapes: list[list[int]]) -> None:
    source, kernel = shapes[0], shapes[1][2:]
    if len(source) != len(shapes[1]) or any(labels[0][2:]):
        return
    stride, dilation, transposed = call.args[3], call.args[5], call.args[6]
    for dim, size in enumerate(kernel):
        step = 1 if transposed else stride[dim % len(stride)]
        source[2 + dim] = min(source[2 + dim], dilation[dim % len(dilation)] * (size - 1) + 1 + step)


def _crop_alike(labels: Sequence[Labels], shapes: list[list[int]], besides: int | None) -> None:
    """Crop dimensions, counted from the back, that are unlabelled in every operand of that rank."""
    rank = max(len(shape) for shape in shapes)
    for back in range(1, rank + 1):
        labelled = any(known[-back] for known in labels if len(known) >= back)
        if labelled or (besides is not None and (besides % rank) == rank - back):
            continue
        for shape in shapes:
            if len(shape) >= back and shape[-back] > 2:
                shape[-back] = 2
