"""What channels cost beside MACs and parameters: anything that can be told from their numbers (level 3).

A resource is any ``(graph) -> terms``; :meth:`ChannelGraph.with_resources` attaches it by name, and then it can
have a budget like any other. It is asked again for every graph, also that of the network after a cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import SupportsFloat

import numpy as np
import torch

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace, Resource, module_of
from lightning_prune.graph.costs import Term
from lightning_prune.tracing.einsum import parse_contraction
from lightning_prune.tracing.ids import Ids, Units
from lightning_prune.tracing.operator_sets import CONVOLUTIONS
from lightning_prune.tracing.tracker import Labels, TracedOperator

__all__ = ["LayerCall", "LayerCost", "Resource", "evidence_of", "layer_calls", "units_along"]

aten = torch.ops.aten
#: which of the tensors are multiplied
_PRODUCTS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default), 1),
}
ONE_MILLION = 1_000_000


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer's weight in the forward that was traced, in eval mode.

    Attributes:
        layer: qualified name of the module that owns the weight.
        weight: qualified name of the weight.
        module: qualified name of the module that was running.
        reads: unit of each channel that it reads, of all groups, -1 for those that cannot go.
        filters: unit of each channel that it makes, likewise.
        shape: of what it reads.
    """

    layer: str
    weight: str
    module: str
    reads: Units
    filters: Units
    shape: tuple[int, ...]


def layer_calls(graph: ChannelGraph) -> list[LayerCall]:
    """Every call of a convolution's or linear layer's weight, in the order of the forward.

    A depthwise convolution reads as many channels as it makes. A layer that is called several times is there as
    often; products of activations (attention) are no layers.

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
    evidence = evidence_of(graph)
    tracker = evidence.tracker
    found = (_call(followed, evidence) for followed in tracker.operators[: tracker.num_costed])
    return [call for call in found if call is not None]


def evidence_of(graph: ChannelGraph) -> DenseTrace:
    """What the trace met, of which resources are made."""
    if graph.evidence is None:
        raise ValueError("this resource needs a graph made by trace(model, *inputs), not by hand")
    return graph.evidence


def units_along(evidence: DenseTrace, labels: Labels, dim: int, size: int) -> Units:
    """The unit of each index along a dimension of a tensor, -1 where it cannot go."""
    if not labels[dim]:
        return np.full(size, -1, dtype=np.int64)
    return evidence.unit_of[evidence.components[labels[dim][0].numpy()]]


def _call(followed: TracedOperator, evidence: DenseTrace) -> LayerCall | None:
    """What the operator reads and makes, if it applies a weight."""
    call = followed.call
    if call.op._opname in CONVOLUTIONS:
        back = call.tensors[1].dim() - 1  # of the channels, from the back, whether there is a batch or not
        return _of(followed, evidence, 1, 0, -back, -back)
    if call.op in _PRODUCTS:
        first = _PRODUCTS[call.op]
        rows = 0 if call.tensors[first + 1].dim() == 1 else -2
        right = _of(followed, evidence, first + 1, first, -1, -1)
        return right or _of(followed, evidence, first, first + 1, rows, rows)
    if call.op == aten.einsum.default:
        return _einsum(followed, evidence)
    return None


def _einsum(followed: TracedOperator, evidence: DenseTrace) -> LayerCall | None:
    equation = parse_contraction(followed.call.args[0])
    if equation is None:
        return None
    *operands, out = equation
    for weight, source in ((1, 0), (0, 1)):
        summed = [letter for letter in operands[weight] if letter not in out]
        own = [letter for letter in operands[weight] if letter in out and letter not in operands[source]]
        if len(summed) == len(own) == 1:
            places = operands[source].index(summed[0]), out.index(own[0])
            if (found := _of(followed, evidence, weight, source, *places)) is not None:
                return found
    return None


def _of(
    followed: TracedOperator, evidence: DenseTrace, weight: int, source: int, reads: int, makes: int
) -> LayerCall | None:
    """The call of the tensor number ``weight``, if that is a parameter or computed from one."""
    name = _parameter(followed.labels[weight], evidence)
    if not name:
        return None
    call, shape = followed.call, followed.shapes[source]
    made, out = followed.labels[len(call.tensors)], call.outputs[0]
    return LayerCall(
        module_of(name),
        name,
        call.module,
        units_along(evidence, followed.labels[source], reads, shape[reads]),
        units_along(evidence, made, makes, out.shape[makes]),
        tuple(int(size) for size in shape),
    )


def _parameter(labels: Labels, evidence: DenseTrace) -> str:
    """The parameter that two dimensions of a tensor come from."""
    tracker = evidence.tracker
    owners = [source for ids in _first(labels) if (source := tracker.origin(ids)) is not None]
    names = [source.name for source in owners if source.name not in tracker.buffers]
    return next((name for name in names if names.count(name) > 1), "")


def _first(labels: Labels) -> Iterator[Ids]:
    return (arrays[0] for arrays in labels if arrays)


@dataclass(frozen=True)
class LayerCost:
    """A resource that a function of your own counts, layer by layer: ``cost(layer, channels_in, channels_out)``.

    The sum over every call of every convolution and linear layer; a layer that is called twice counts twice. A
    depthwise convolution has as many channels in as out. Each result is asked for once and remembered.

    Args:
        cost: ``(layer, channels_in, channels_out) -> cost`` in any unit; ``layer`` is the qualified name of the
            module that owns the weight. It should not fall when channels are added, and must give the same on
            every process.
        scale: parts into which a unit of ``cost`` is divided: resources are whole numbers. With a cost in
            milliseconds and the default of a million, the resource counts nanoseconds; so do budgets above 1.

    Raises:
        ValueError: when called: a cost is no number, negative, or not finite; the message names the layer.

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
    _known: dict[tuple[str, int, int], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, graph: ChannelGraph) -> list[Term]:
        """One term per call of a layer."""
        return [self._term(call) for call in layer_calls(graph)]

    def of(self, layer: str, channels_in: int, channels_out: int) -> float:
        """The cost of one layer, checked, in the unit of ``cost``."""
        key = layer, channels_in, channels_out
        if key not in self._known:
            self._known[key] = checked(self.cost(*key), *key)
        return self._known[key]

    def _term(self, call: LayerCall) -> Term:
        sides = [call.reads, call.filters]
        fixed = [int((units < 0).sum()) for units in sides]
        shrinking = [units[units >= 0] for units in sides]
        factors = tuple(units for units in shrinking if len(units))
        function = partial(self._at, call.layer, fixed, [len(units) > 0 for units in shrinking])
        return Term(call.weight, self.scale, factors, function)

    def _at(self, layer: str, fixed: list[int], shrinks: list[bool], *counts: int) -> float:
        left = iter(counts)
        reads, filters = (n + (next(left) if goes else 0) for n, goes in zip(fixed, shrinks, strict=True))
        return self.of(layer, reads, filters)


def checked(cost: object, layer: str, channels_in: int, channels_out: int) -> float:
    """A cost as a float; raise ValueError if it is none, or not finite, or negative."""
    number = float(cost) if isinstance(cost, SupportsFloat) and not isinstance(cost, bool) else math.nan
    if math.isfinite(number) and number >= 0:
        return number
    raise ValueError(
        f"the cost of layer {layer!r} with {channels_in} channels in and {channels_out} out must be a finite "
        f"number of 0 or more, got {cost!r}"
    )
