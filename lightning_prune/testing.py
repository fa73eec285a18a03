"""Two ways to know what a pruned network must compute, independent of how it was pruned (level 3).

*Dead filters*: in the dense network every removed filter's own parameters are zero (weight rows, bias, norm
scale and shift). It knows nothing of consumers. Holds where a zero stays a zero: activations with f(0) = 0,
multiplicative gates.

*Zeroed consumers*: in the dense network every removed input slice of a weight is zero. Holds where weights are
the only consumers.

Neither holds for units whose removal changes statistics across channels (``graph.statistics_units``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.calls import tensors_in

__all__ = ["error", "randomise_", "with_dead_filters", "with_zeroed_consumers"]


def with_dead_filters(model: nn.Module, graph: ChannelGraph, remove: Iterable[int]) -> nn.Module:
    """A copy of the dense model in which the removed filters' own parameters are zero."""
    return _zeroed(model, graph, remove, consumers=False)


def with_zeroed_consumers(model: nn.Module, graph: ChannelGraph, remove: Iterable[int]) -> nn.Module:
    """A copy of the dense model in which the weights that read the removed filters are zero there."""
    return _zeroed(model, graph, remove, consumers=True)


def _zeroed(model: nn.Module, graph: ChannelGraph, remove: Iterable[int], consumers: bool) -> nn.Module:
    twin = copy.deepcopy(model)
    parameters, kept = dict(twin.named_parameters()), graph.kept(remove)
    for name, dims in graph.bindings.items():
        for dim, units in dims.items() if name in parameters else ():
            reads = name in graph.layers and dim != graph.filter_dims[name]
            if reads == consumers:
                gone = torch.from_numpy(np.flatnonzero(~kept[units]))
                parameters[name].data.index_fill_(dim, gone, 0)
    return twin


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms and biases random values, so that a wrong channel shows; fresh ones are all alike."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name == "running_var":
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    for parameter in model.parameters():
        if parameter.dim() <= 1 and parameter.is_floating_point():
            noise = torch.rand(parameter.shape, generator=generator) * 0.5
            parameter.data.add_(noise)
    return model


@torch.no_grad()
def error(expected: nn.Module, found: nn.Module, *inputs: Tensor) -> float:
    """Largest difference between two networks' outputs in eval mode, relative to the largest output."""
    pairs = zip(tensors_in(expected.eval()(*inputs)), tensors_in(found.eval()(*inputs)), strict=True)
    worst = 0.0
    for want, have in pairs:
        if want.shape != have.shape:
            return float("inf")
        worst = max(worst, float((want - have).abs().max() / want.abs().max().clamp_min(1e-12)))
    return worst
