"""The operators of a network, each as a template for any number of channels (level 3).

A trace has recorded every operator with its arguments, and knows which units run along which dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.latency.operator_template import Operator, Size, Slot, contracts
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.operator_sets import CONVOLUTIONS
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["operators"]

SIZES = ("size", "shape")  # arguments that repeat the result's sizes


def operators(graph: ChannelGraph) -> list[Operator]:
    """Every operator of the traced forward in eval mode that computes something, in order.

    Views are left out: they move nothing.

    Raises:
        ValueError: the graph was not made by :func:`~lightning_prune.trace`.

    Example:
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1))
        >>> for operator in operators(trace(net, torch.zeros(1, 3, 16, 16))):
        ...     print(operator.layer, operator.most)
        0.weight (8,)
        1 (8,)
        2.weight (8,)
    """
    if graph.evidence is None:
        raise ValueError("this graph was not made by trace(), so its operators are not known")
    templates = _Templates(graph.evidence)
    followed = graph.evidence.tracker.operators[: graph.evidence.tracker.num_costed]
    return [templates.operator(each) for each in followed if _computes(each)]


def _computes(followed: TracedOperator) -> bool:
    call = followed.call
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in call.op._schema.returns)
    return (
        bool(call.tensors and call.outputs) and not views and call.op._opname not in ("empty_like", "detach")
    )


@dataclass(eq=False)
class _Templates:
    """Makes templates of recorded operators."""

    evidence: DenseTrace

    def __post_init__(self) -> None:
        # By identity: the same ids run through many operators.
        self._units: dict[int, tuple[Ids, Units | None]] = {}
        self._made: dict[int, Operator] = {}
        model = self.evidence.tracker.model
        self._tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def operator(self, followed: TracedOperator) -> Operator:
        call, count = followed.call, len(followed.shapes)
        factors: list[Units] = []
        slots = iter(
            Slot(
                self._sizes(shape, labels, factors),
                tensor.dtype,
                _order(tensor, shape),
                self._held(tensor, labels),
            )
            for tensor, shape, labels in zip(call.tensors, followed.shapes, followed.labels, strict=False)
        )
        leaves, spec = tree_flatten((list(call.args), dict(call.kwargs)))
        filled = [next(slots) if isinstance(leaf, Tensor) else _plain(leaf) for leaf in leaves]
        written = zip(call.outputs, followed.labels[count:], strict=True)
        outputs = [self._sizes(tensor.shape, labels, factors) for tensor, labels in written]
        found = Operator(call.op, call.module, self._layer(followed), filled, spec, factors, outputs)
        _adapt(found)
        found.source = self._made.get(id(call.tensors[0]))
        self._made.update(dict.fromkeys(map(id, call.outputs), found))
        return found

    def _held(self, tensor: Tensor, labels: Labels) -> bool:
        """Whether it is a parameter or buffer, or a view of one: then two dimensions come from the same."""
        owners = [self.evidence.tracker.origin(arrays[0]) for arrays in labels if arrays]
        names = [owner.name for owner in owners if owner is not None]
        return id(tensor) in self._tensors or len(set(names)) < len(names)

    def _sizes(self, shape: torch.Size, labels: Labels, factors: list[Units]) -> tuple[int | Size, ...]:
        return tuple(
            self._size(int.__int__(size), arrays, factors) for size, arrays in zip(shape, labels, strict=True)
        )

    def _size(self, size: int, arrays: tuple[Ids, ...], factors: list[Units]) -> int | Size:
        axes = [_axis(units, factors) for ids in arrays if (units := self._shrinking(ids)) is not None]
        return Size(size, tuple(axes)) if axes else size

    def _shrinking(self, ids: Ids) -> Units | None:
        """The units of a dimension, None if it cannot shrink."""
        if id(ids) not in self._units:
            components = self.evidence.components[ids.numpy()]
            units = self.evidence.unit_of[components]
            stays = not len(units) or (units < 0).any() or self.evidence.pinned[components].all()
            self._units[id(ids)] = ids, None if stays else units
        return self._units[id(ids)][1]

    def _layer(self, followed: TracedOperator) -> str:
        """The weight that an operator contracts with; otherwise the module that called it."""
        tracker = self.evidence.tracker
        for labels in followed.labels[1 : len(followed.shapes)] if contracts(followed.call.op) else ():
            for arrays in labels:
                if (
                    source := tracker.origin(arrays[0] if arrays else None)
                ) is not None and source.name in tracker.filters:
                    return source.name
        return followed.call.module


def _axis(units: Units, factors: list[Units]) -> int:
    for axis, known in enumerate(factors):
        if np.array_equal(known, units):
            return axis
    factors.append(units)
    return len(factors) - 1


def _order(tensor: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Dimensions by stride, largest first."""
    strides = tensor.stride()
    return tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim)))


def _plain(leaf: Any) -> Any:
    return int.__int__(leaf) if isinstance(leaf, int) and not isinstance(leaf, bool) else leaf


def _adapt(operator: Operator) -> None:
    """Let the numbers among the arguments follow the channels."""
    operator.steps = [1] * len(operator.factors)
    name, spec = operator.op._opname, operator.spec
    args, kwargs = tree_unflatten(operator.leaves, spec)
    if name in CONVOLUTIONS:
        args = _convolution(operator, args)
    elif name == "native_group_norm" and isinstance(args[0].sizes[1], Size):
        args[4] = args[0].sizes[1]
        operator.steps[args[4].axes[0]] = args[6]
    elif name in ("native_layer_norm", "_fused_rms_norm"):
        args[1] = list(args[0].sizes[len(args[0].sizes) - len(args[1]) :])
    else:
        args = [_like_result(operator, at, value) for at, value in enumerate(args)]
    operator.leaves, operator.spec = tree_flatten((args, kwargs))


def _like_result(operator: Operator, at: int, value: Any) -> Any:
    named = operator.op._schema.arguments[at].name in SIZES
    return list(operator.outputs[0]) if named and isinstance(value, list) else value


def _convolution(operator: Operator, args: list[Any]) -> list[Any]:
    """Depthwise: as many groups as channels. Grouped: as many inputs as the weight wants, times the groups."""
    source, weight, groups, transposed = args[0], args[1], args[8], args[6]
    channel = len(source.sizes) - (len(weight.sizes) - 2) - 1
    into = weight.sizes[0 if transposed else 1]
    if groups == 1 or not isinstance(source.sizes[channel], Size):
        return args
    if source.sizes[channel].dense == groups:
        args[8] = source.sizes[channel]
    elif not transposed and isinstance(into, Size):
        return _grouped(operator, args, channel, Size(groups * into.dense, into.axes, groups))
    return args


def _grouped(operator: Operator, args: list[Any], channel: int, size: Size) -> list[Any]:
    source, weight = args[0], args[1]
    sizes = (*source.sizes[:channel], size, *source.sizes[channel + 1 :])
    dropped = source.sizes[channel].axes[0]
    operator.leaves[0] = replace(source, sizes=sizes)
    for axis in {a for s in weight.sizes[:1] if isinstance(s, Size) for a in s.axes}:
        operator.steps[axis] = args[8]
    args[0] = operator.leaves[0]
    return _without(operator, dropped, args)


def _without(operator: Operator, axis: int, args: list[Any]) -> list[Any]:
    """Drop an axis that follows another, and number the rest anew."""
    used = {
        a
        for leaf in tree_flatten(args)[0]
        if isinstance(leaf, Slot)
        for s in leaf.sizes
        if isinstance(s, Size)
        for a in s.axes
    }
    if axis in used:
        return args
    kept = [a for a in range(len(operator.factors)) if a != axis]
    number = {old: new for new, old in enumerate(kept)}

    def moved(size: int | Size) -> int | Size:
        if not isinstance(size, Size) or axis in size.axes:
            return size.dense if isinstance(size, Size) else size
        return Size(size.dense, tuple(number[a] for a in size.axes), size.times)

    operator.factors = [operator.factors[a] for a in kept]
    operator.steps = [operator.steps[a] for a in kept]
    operator.outputs = [tuple(map(moved, sizes)) for sizes in operator.outputs]
    return [replace(a, sizes=tuple(map(moved, a.sizes))) if isinstance(a, Slot) else a for a in args]
