"""Oracles that set parameters of the dense network to zero, and the comparison of outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.utils.modules import drop_caches_, named_tensors

__all__ = ["error", "randomise_", "with_dead_filters", "with_zeroed_consumers", "zeroed_copy"]


def with_dead_filters(model: nn.Module, graph: ChannelGraph, remove: Iterable[int]) -> nn.Module:
    """Return a copy of the dense model in which the parameters of the removed filters are zero.

    Args:
        model: the dense network, before :func:`~lightning_prune.prune_`, or a copy of it.
        graph: of the dense network.
        remove: numbers of the units to remove.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> dead = with_dead_filters(net, graph, [0, 5])
        >>> (dead[0].weight == 0).all(dim=(1, 2, 3)).nonzero().flatten(), dead[0].bias[5].item()
        (tensor([0, 5]), 0.0)
    """
    return _with_zeros(model, graph, remove, consumers=False)


def with_zeroed_consumers(model: nn.Module, graph: ChannelGraph, remove: Iterable[int]) -> nn.Module:
    """Return a copy of the dense model in which the weights that read the removed filters are zero there.

    Args:
        model: the dense network, before :func:`~lightning_prune.prune_`, or a copy of it.
        graph: of the dense network.
        remove: numbers of the units to remove.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> zeroed = with_zeroed_consumers(net, graph, [0, 5])
        >>> (zeroed[2].weight == 0).all(dim=0).nonzero()[:, 0]
        tensor([0, 5])
    """
    return _with_zeros(model, graph, remove, consumers=True)


def _with_zeros(model: nn.Module, graph: ChannelGraph, remove: Iterable[int], consumers: bool) -> nn.Module:
    """Copy the model with zeros for the removed units: in all weights that read them, or in all other parameters."""
    parameters = dict(model.named_parameters())

    def chosen(name: str, dim: int) -> bool:
        is_consumer = name in graph.layers and dim != graph.filter_dims[name]
        return name in parameters and is_consumer == consumers

    return zeroed_copy(model, graph, remove, chosen)


def zeroed_copy(
    model: nn.Module, graph: ChannelGraph, remove: Iterable[int], chosen: Callable[[str, int], bool]
) -> nn.Module:
    """Return a copy of the model with zeros for the removed units.

    Args:
        model: the dense network.
        graph: of the dense network.
        remove: numbers of the units to remove.
        chosen: name of a parameter or buffer, dimension -> whether it gets zeros along this dimension.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> graph = trace(net, torch.zeros(1, 3))
        >>> zeroed = zeroed_copy(net, graph, [0, 3], lambda name, dim: name == "0.bias")
        >>> (zeroed[0].bias == 0).tolist(), torch.equal(zeroed[0].weight, net[0].weight)
        ([True, False, False, True], True)
    """
    twin = copy.deepcopy(model)
    tensors, kept = named_tensors(twin), graph.kept(remove)
    for name, dims in graph.bindings.items():
        for dim, units in dims.items() if name in tensors else ():
            if chosen(name, dim):
                tensors[name].data.index_fill_(dim, torch.from_numpy(np.flatnonzero(~kept[units])), 0)
    drop_caches_(twin)  # after the zeros: some modules compute what they cache when they enter eval mode
    return twin


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change biases, norm parameters and running statistics to random values, in place, and return the model.

    In a new network all channels of a norm have the same values, so that a test would not notice if the wrong channel
    was removed. Parameters with several dimensions are not changed.

    Args:
        model: any network.
        seed: of the random values.

    Example:
        >>> norm = randomise_(nn.BatchNorm2d(8))
        >>> len(norm.weight.unique()), len(norm.running_var.unique())
        (8, 8)
    """
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
def error(expected: nn.Module, actual: nn.Module, *inputs: Tensor) -> float:
    """Return the largest difference between the outputs of two networks, relative to the largest expected value.

    Both networks are switched to eval mode. Outputs may be nested tuples, lists, dictionaries or dataclasses of
    tensors; the result is the largest error of all these tensors.

    Args:
        expected: the reference network, such as :func:`with_dead_filters`.
        actual: the network to check.
        *inputs: of both networks.

    Returns:
        The relative error; infinity if the shapes of two outputs differ.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> second.load_state_dict({name: 1.5 * value for name, value in first.state_dict().items()})
        <All keys matched successfully>
        >>> error(first, first, torch.ones(1, 2)), round(error(first, second, torch.ones(1, 2)), 3)
        (0.0, 0.5)
    """
    expected_outputs, actual_outputs = (
        tensors_in(expected.eval()(*inputs)),
        tensors_in(actual.eval()(*inputs)),
    )
    worst = 0.0
    for reference, output in zip(expected_outputs, actual_outputs, strict=True):
        if reference.shape != output.shape:
            return float("inf")
        if not reference.numel():
            continue
        scale = reference.abs().max().clamp_min(1e-12)
        worst = max(worst, float((reference - output).abs().max() / scale))
    return worst
