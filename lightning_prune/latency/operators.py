"""Build operator templates from a trace.

A trace has recorded every operator with its arguments, and which units run along which dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.latency.operator_template import Operator, Size, Slot, is_contraction
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.operator_sets import CONVOLUTIONS
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["operators"]

SIZE_ARGUMENTS = ("size", "shape")  # arguments that repeat the sizes of the result


def operators(graph: ChannelGraph) -> list[Operator]:
    """Return every operator of the traced forward in eval mode that computes something, in order.

    Views are left out: they take no time.

    Raises:
        ValueError: the graph was not made by :func:`~lightning_prune.trace`.

    Example:
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1))
        >>> for operator in operators(trace(net, torch.zeros(1, 3, 16, 16))):
        ...     print(operator.layer, operator.dense_counts)
        0.weight (8,)
        1 (8,)
        2.weight (8,)
    """
    if graph.evidence is None:
        raise ValueError(
            "this graph was not made by trace(), so its operators are unknown; call trace(model, input)"
        )
    templates = _TemplateBuilder(graph.evidence)
    traced = graph.evidence.tracker.operators[: graph.evidence.tracker.num_costed]
    return [templates.build(operator) for operator in traced if _computes(operator)]


def _computes(traced: TracedOperator) -> bool:
    call = traced.call
    returns_view = any(
        r.alias_info is not None and not r.alias_info.is_write for r in call.op._schema.returns
    )
    does_nothing = returns_view or call.op._opname in ("empty_like", "detach")
    return bool(call.tensors and call.outputs) and not does_nothing


@dataclass(eq=False)
class _TemplateBuilder:
    """Build the templates of a trace."""

    evidence: DenseTrace

    def __post_init__(self) -> None:
        # By identity, since the same array of ids belongs to many operators. The array is stored too: its id() must
        # not be used again for another array.
        self._units: dict[int, tuple[Ids, Units | None]] = {}
        self._producers: dict[int, Operator] = {}
        model = self.evidence.tracker.model
        self._parameters = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def build(self, traced: TracedOperator) -> Operator:
        """Return the template of a traced operator."""
        call, num_inputs = traced.call, len(traced.shapes)
        factors: list[Units] = []
        inputs = zip(call.tensors, traced.shapes, traced.labels, strict=False)
        slots = iter(self._slot(tensor, shape, labels, factors) for tensor, shape, labels in inputs)
        leaves, spec = tree_flatten((list(call.args), dict(call.kwargs)))
        leaves = [next(slots) if isinstance(leaf, Tensor) else _plain_number(leaf) for leaf in leaves]
        results = zip(call.outputs, traced.labels[num_inputs:], strict=True)
        outputs = [self._sizes(tensor.shape, labels, factors) for tensor, labels in results]
        operator = Operator(call.op, call.module, self._layer(traced), leaves, spec, factors, outputs)
        _adapt_arguments(operator)
        operator.source = self._producers.get(id(call.tensors[0]))
        self._producers.update(dict.fromkeys(map(id, call.outputs), operator))
        return operator

    def _slot(self, tensor: Tensor, shape: torch.Size, labels: Labels, factors: list[Units]) -> Slot:
        sizes = self._sizes(shape, labels, factors)
        return Slot(sizes, tensor.dtype, _memory_order(tensor, shape), self._is_parameter(tensor, labels))

    def _is_parameter(self, tensor: Tensor, labels: Labels) -> bool:
        """Return whether a tensor is a parameter, a buffer, or a view of one: two dimensions have the same origin."""
        origins = [self.evidence.tracker.origin(arrays[0]) for arrays in labels if arrays]
        names = [origin.name for origin in origins if origin is not None]
        return id(tensor) in self._parameters or len(set(names)) < len(names)

    def _sizes(self, shape: torch.Size, labels: Labels, factors: list[Units]) -> tuple[int | Size, ...]:
        dims = zip(shape, labels, strict=True)
        return tuple(self._size(int.__int__(size), arrays, factors) for size, arrays in dims)

    def _size(self, size: int, arrays: tuple[Ids, ...], factors: list[Units]) -> int | Size:
        axes = [_axis(units, factors) for ids in arrays if (units := self._shrinking_units(ids)) is not None]
        return Size(size, tuple(axes)) if axes else size

    def _shrinking_units(self, ids: Ids) -> Units | None:
        """Return the units of a dimension, None if it cannot shrink."""
        if id(ids) not in self._units:
            components = self.evidence.components[ids.numpy()]
            units = self.evidence.unit_of[components]
            is_fixed = not len(units) or (units < 0).any() or self.evidence.pinned[components].all()
            self._units[id(ids)] = ids, None if is_fixed else units
        return self._units[id(ids)][1]

    def _layer(self, traced: TracedOperator) -> str:
        """Return the weight that an operator contracts with, otherwise the module that called it."""
        tracker = self.evidence.tracker
        for labels in traced.labels[1 : len(traced.shapes)] if is_contraction(traced.call.op) else ():
            for arrays in labels:
                origin = tracker.origin(arrays[0] if arrays else None)
                if origin is not None and origin.name in tracker.filters:
                    return origin.name
        return traced.call.module


def _axis(units: Units, factors: list[Units]) -> int:
    """Return the index of the axis with these units; add it if it is new."""
    for axis, factor in enumerate(factors):
        if np.array_equal(factor, units):
            return axis
    factors.append(units)
    return len(factors) - 1


def _memory_order(tensor: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Return the dimensions by stride, the largest first."""
    strides = tensor.stride()
    return tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim)))


def _plain_number(leaf: Any) -> Any:
    """Convert a traced integer to a plain one."""
    return int.__int__(leaf) if isinstance(leaf, int) and not isinstance(leaf, bool) else leaf


def _adapt_arguments(operator: Operator) -> None:
    """Replace numbers among the arguments that depend on channel counts by sizes, and set the steps."""
    operator.steps = [1] * len(operator.factors)
    name, spec = operator.op._opname, operator.spec
    args, kwargs = tree_unflatten(operator.leaves, spec)
    if name in CONVOLUTIONS:
        args = _adapt_convolution(operator, args)
    elif name == "native_group_norm" and isinstance(args[0].sizes[1], Size):
        args[4] = args[0].sizes[1]
        operator.steps[args[4].axes[0]] = args[6]
    elif name in ("native_layer_norm", "_fused_rms_norm"):
        args[1] = list(args[0].sizes[len(args[0].sizes) - len(args[1]) :])
    else:
        args = [_result_sizes(operator, index, value) for index, value in enumerate(args)]
    operator.leaves, operator.spec = tree_flatten((args, kwargs))


def _result_sizes(operator: Operator, index: int, value: Any) -> Any:
    """Return the result's sizes for an argument that repeats them, any other argument unchanged."""
    is_size = operator.op._schema.arguments[index].name in SIZE_ARGUMENTS
    return list(operator.outputs[0]) if is_size and isinstance(value, list) else value


def _adapt_convolution(operator: Operator, args: list[Any]) -> list[Any]:
    """Adapt the groups of a depthwise convolution, or the input channels of a grouped one, to the channel counts."""
    source, weight, groups, transposed = args[0], args[1], args[8], args[6]
    channel_dim = len(source.sizes) - (len(weight.sizes) - 2) - 1
    inputs_per_group = weight.sizes[0 if transposed else 1]
    if groups == 1 or not isinstance(source.sizes[channel_dim], Size):
        return args
    if source.sizes[channel_dim].dense == groups:
        args[8] = source.sizes[channel_dim]
    elif not transposed and isinstance(inputs_per_group, Size):
        size = Size(groups * inputs_per_group.dense, inputs_per_group.axes, groups)
        return _adapt_grouped(operator, args, channel_dim, size)
    return args


def _adapt_grouped(operator: Operator, args: list[Any], channel_dim: int, size: Size) -> list[Any]:
    """Express the input's channels by the axis of the weight, and drop the input's own axis."""
    source, weight = args[0], args[1]
    dropped = source.sizes[channel_dim].axes[0]
    sizes = (*source.sizes[:channel_dim], size, *source.sizes[channel_dim + 1 :])
    operator.leaves[0] = args[0] = replace(source, sizes=sizes)
    for axis in _axes(weight.sizes[:1]):
        operator.steps[axis] = args[8]
    return _drop_axis(operator, dropped, args)


def _axes(sizes: tuple[int | Size, ...]) -> set[int]:
    return {axis for size in sizes if isinstance(size, Size) for axis in size.axes}


def _drop_axis(operator: Operator, axis: int, args: list[Any]) -> list[Any]:
    """Drop an axis that no tensor argument uses any more, and number the others anew."""
    if any(axis in _axes(leaf.sizes) for leaf in tree_flatten(args)[0] if isinstance(leaf, Slot)):
        return args
    kept = [a for a in range(len(operator.factors)) if a != axis]
    new_number = {old: new for new, old in enumerate(kept)}

    def renumber(size: int | Size) -> int | Size:
        if not isinstance(size, Size) or axis in size.axes:
            return size.dense if isinstance(size, Size) else size
        return Size(size.dense, tuple(new_number[a] for a in size.axes), size.times)

    operator.factors = [operator.factors[a] for a in kept]
    operator.steps = [operator.steps[a] for a in kept]
    operator.outputs = [tuple(map(renumber, sizes)) for sizes in operator.outputs]
    return [
        replace(arg, sizes=tuple(map(renumber, arg.sizes))) if isinstance(arg, Slot) else arg for arg in args
    ]
