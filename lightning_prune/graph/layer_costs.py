"""Resources that depend on the channels of each layer, such as energy or the time on special hardware.

A resource is any function ``(graph) -> terms``. :meth:`ChannelGraph.with_resources` attaches it under a name, and
then it can have a budget like MACs and parameters. It is computed again for every traced graph, also after a cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import SupportsFloat

import numpy as np
import torch

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace, Resource
from lightning_prune.graph.costs import Term
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.tracing.einsum import parse_contraction
from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.operator_sets import CONVOLUTIONS
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["LayerCall", "LayerCost", "Resource", "dense_trace_of", "layer_calls", "units_along"]

aten = torch.ops.aten
#: matrix product -> position, among its tensor arguments, of the left factor; the right one follows
_PRODUCTS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default), 1),
}
ONE_MILLION = 1_000_000


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer's weight in the traced forward, in eval mode.

    Attributes:
        layer: qualified name of the module that owns the weight.
        weight: qualified name of the weight.
        module: qualified name of the module whose forward made the call.
        reads: unit of each input channel, of all groups; -1 for channels that are never removed.
        filters: unit of each output channel; -1 for channels that are never removed.
        shape: of the input.
    """

    layer: str
    weight: str
    module: str
    reads: Units
    filters: Units
    shape: tuple[int, ...]


def layer_calls(graph: ChannelGraph) -> list[LayerCall]:
    """Return every call of a convolution's or linear layer's weight, in the order of the forward.

    A depthwise convolution has as many input channels as output channels. A layer that is called several times is
    listed as often. Products of activations (attention) are not listed.

    Raises:
        ValueError: the graph was not made by :func:`~lightning_prune.trace`.

    Example:
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 8, 3, groups=2))
        >>> for call in layer_calls(trace(net, torch.zeros(1, 3, 8, 8))):
        ...     print(call.layer, len(call.reads), len(call.filters), call.shape)
        0 3 4 (1, 3, 8, 8)
        1 4 8 (1, 4, 8, 8)
    """
    dense = dense_trace_of(graph)
    operators = dense.tracker.operators[: dense.tracker.num_costed]
    calls = (_layer_call(operator, dense) for operator in operators)
    return [call for call in calls if call is not None]


def dense_trace_of(graph: ChannelGraph) -> DenseTrace:
    """Return the trace of a graph; raise ValueError if the graph was made by hand."""
    if graph.evidence is None:
        raise ValueError("this resource needs a graph made by trace(model, *inputs), not by hand")
    return graph.evidence


def units_along(dense: DenseTrace, labels: Labels, dim: int, size: int) -> Units:
    """Return the unit of each index along a dimension of a tensor, -1 for indices that are never removed.

    Args:
        dense: the trace.
        labels: of the tensor.
        dim: the dimension.
        size: its size.
    """
    if not labels[dim]:
        return np.full(size, -1, dtype=np.int64)
    return dense.unit_of[dense.components[labels[dim][0].numpy()]]


def _layer_call(operator: TracedOperator, dense: DenseTrace) -> LayerCall | None:
    """Return the layer call of an operator; None if it does not apply a weight."""
    call = operator.call
    if call.op._opname in CONVOLUTIONS:
        channel_dim = (
            1 - call.tensors[1].dim()
        )  # counted from the end, since the batch dimension may be missing
        return _call_of_weight(operator, dense, 1, 0, channel_dim, channel_dim)
    if call.op in _PRODUCTS:
        left = _PRODUCTS[call.op]
        right = left + 1
        summed_dim = 0 if call.tensors[right].dim() == 1 else -2
        return _call_of_weight(operator, dense, right, left, -1, -1) or _call_of_weight(
            operator, dense, left, right, summed_dim, summed_dim
        )
    if call.op == aten.einsum.default:
        return _einsum_call(operator, dense)
    return None


def _einsum_call(operator: TracedOperator, dense: DenseTrace) -> LayerCall | None:
    equation = parse_contraction(operator.call.args[0])
    if equation is None:
        return None
    *operands, out = equation
    for weight, source in ((1, 0), (0, 1)):
        summed = [letter for letter in operands[weight] if letter not in out]
        filters = [letter for letter in operands[weight] if letter in out and letter not in operands[source]]
        if len(summed) == len(filters) == 1:
            dims = operands[source].index(summed[0]), out.index(filters[0])
            if (call := _call_of_weight(operator, dense, weight, source, *dims)) is not None:
                return call
    return None


def _call_of_weight(
    operator: TracedOperator, dense: DenseTrace, weight: int, source: int, in_dim: int, out_dim: int
) -> LayerCall | None:
    """Return the call of a weight; None if that tensor is neither a parameter nor computed from one.

    Args:
        operator: that applies the weight.
        dense: the trace.
        weight: position of the weight among the tensor arguments.
        source: position of the input among the tensor arguments.
        in_dim: channel dimension of the input.
        out_dim: channel dimension of the result.
    """
    name = _parameter_of(operator.labels[weight], dense)
    if not name:
        return None
    call, shape = operator.call, operator.shapes[source]
    out, out_labels = call.outputs[0], operator.labels[len(call.tensors)]
    return LayerCall(
        module_of(name),
        name,
        call.module,
        units_along(dense, operator.labels[source], in_dim, shape[in_dim]),
        units_along(dense, out_labels, out_dim, out.shape[out_dim]),
        tuple(int(size) for size in shape),
    )


def _parameter_of(labels: Labels, dense: DenseTrace) -> str:
    """Return the parameter that two dimensions of a tensor come from; an empty string if there is none."""
    tracker = dense.tracker
    origins = [tracker.origin(arrays[0]) for arrays in labels if arrays]
    names = [origin.name for origin in origins if origin is not None and origin.name not in tracker.buffers]
    return next((name for name in names if names.count(name) > 1), "")


@dataclass(frozen=True)
class LayerCost:
    """Resource defined by a function of each layer's channels: ``cost(layer, channels_in, channels_out)``.

    The resource is the sum over all calls of convolutions and linear layers. A layer that is called twice is added
    twice. A depthwise convolution has as many input channels as output channels. The function is called once for each
    combination of arguments.

    Args:
        cost: function ``(layer, channels_in, channels_out) -> cost``, in any unit. ``layer`` is the qualified name of
            the module that owns the weight. The cost should not fall when channels are added, and must be the same on
            every process.
        scale: number of parts of one unit of ``cost``, since resources are whole numbers. With a cost in milliseconds
            and the default of a million, the resource is in nanoseconds, and so are absolute budgets (above 1).

    Raises:
        ValueError: when called: a cost is not a number, negative, or not finite; the message names the layer.

    Example:
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 1))
        >>> energy = LayerCost(lambda layer, channels_in, channels_out: 0.5 * channels_in * channels_out, scale=10)
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16)).with_resources({"energy": energy})
        >>> graph.cost("energy"), graph.cost("energy", remove=[0])
        (200, 175)
    """

    cost: Callable[[str, int, int], float]
    scale: int = ONE_MILLION
    _cache: dict[tuple[str, int, int], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, graph: ChannelGraph) -> list[Term]:
        """Return one term per call of a layer."""
        return [self._term(call) for call in layer_calls(graph)]

    def of(self, layer: str, channels_in: int, channels_out: int) -> float:
        """Return the checked cost of one layer, in the unit of ``cost``."""
        key = layer, channels_in, channels_out
        if key not in self._cache:
            self._cache[key] = checked(self.cost(*key), *key)
        return self._cache[key]

    def _term(self, call: LayerCall) -> Term:
        sides = [call.reads, call.filters]
        fixed = [int((units < 0).sum()) for units in sides]
        removable = [units[units >= 0] for units in sides]
        function = partial(self._cost_of, call.layer, fixed, [len(units) > 0 for units in removable])
        return Term(call.weight, self.scale, tuple(units for units in removable if len(units)), function)

    def _cost_of(self, layer: str, fixed: list[int], shrinks: list[bool], *counts: int) -> float:
        """Return the cost of a layer.

        Args:
            layer: its name.
            fixed: numbers of input and output channels that are never removed.
            shrinks: whether the input and the output have removable channels.
            *counts: numbers of remaining removable channels, of the sides that have some.
        """
        remaining = iter(counts)
        sides = zip(fixed, shrinks, strict=True)
        channels_in, channels_out = (
            number + (next(remaining) if shrinking else 0) for number, shrinking in sides
        )
        return self.of(layer, channels_in, channels_out)


def checked(cost: object, layer: str, channels_in: int, channels_out: int) -> float:
    """Return a cost as a float; raise ValueError if it is not a number, not finite, or negative."""
    number = float(cost) if isinstance(cost, SupportsFloat) and not isinstance(cost, bool) else math.nan
    if math.isfinite(number) and number >= 0:
        return number
    raise ValueError(
        f"the cost of layer {layer!r} with {channels_in} channels in and {channels_out} out must be a finite "
        f"number of 0 or more, got {cost!r}"
    )
