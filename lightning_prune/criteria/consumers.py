"""The layers that read units, the energy of their weights per input, and an observer of what they read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria.base import Values
from lightning_prune.criteria.channel_variance import ChannelVariance
from lightning_prune.criteria.collector import channels_second
from lightning_prune.criteria.layer_metrics import LayerMetrics, layers_by_weight
from lightning_prune.criteria.reduction import plain
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.modules import stored_tensor

__all__ = ["Consumer", "ConsumerInputs", "find_consumers"]

_ATTENTION_ARGUMENTS = inspect.signature(nn.MultiheadAttention.forward)
#: third of the stacked weight of an attention -> what it reads
_ATTENTION_INPUTS = ("query", "key", "value")


@dataclass(frozen=True)
class Consumer:
    """A linear map that reads units.

    Attributes:
        key: qualified name of its weight, dimension of the inputs, and, in an attention, what it reads.
        weight: its weight; of an attention the rows of one projection.
        dim: the dimension of ``weight`` along which its inputs lie.
        groups: number of groups; in a transposed layer (``dim`` 0) every input has an index of its own, in others the
            groups share the indices along ``dim``.
        units: unit of each index along ``dim``.
        modules: the modules that hold the weight.
    """

    key: str
    weight: Tensor
    dim: int
    groups: int
    units: Units
    modules: tuple[nn.Module, ...]

    def shares(self, variances: Values | None = None) -> Values:
        """Return the share of each index along ``dim`` in the output energy, averaged over filters.

        The energy of filter k is the sum of ``W_ki^2 * Var(x_i)`` over its inputs i and taps. Filters without energy
        add nothing.

        Args:
            variances: of each input channel; None: equal ones.
        """
        energy = self._squares()
        if variances is not None:
            energy = energy * variances.reshape(*energy.shape[:2], 1)
        total = energy.sum(1, keepdims=True)
        shares = (energy / np.where(total > 0, total, 1.0)).sum(2) / (energy.shape[0] * energy.shape[2])
        return shares.reshape(-1) if self.dim == 0 else shares.sum(0)

    def by_channel(self, values: Values) -> Values:
        """Return the value of each input channel from values per index along ``dim``, which groups share."""
        return values if self.dim == 0 else np.tile(values, self.groups)

    def _squares(self) -> Values:
        """Return squared weights summed over taps, shape (groups, inputs of a group, filters of a group)."""
        squares = plain(self.weight.detach().double().square().reshape(*self.weight.shape[:2], -1).sum(2))
        if self.dim == 0:
            return squares.reshape(self.groups, -1, squares.shape[1])
        return squares.reshape(self.groups, -1, squares.shape[1]).transpose(0, 2, 1)


def find_consumers(graph: ChannelGraph, model: nn.Module) -> list[Consumer]:
    """Return the convolutions, linear layers and projections of attentions that read units which may be removed.

    A depthwise convolution is none: its filter has no input dimension, the unit goes on through it, and whatever
    reads its output is a consumer of the same unit.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
        >>> [consumer.key for consumer in find_consumers(trace(net, torch.zeros(1, 1, 8, 8)), net)]
        ['2.weight:1']
    """
    layers = layers_by_weight(model)
    attentions = {
        id(w): m for m in model.modules() if isinstance(m, nn.MultiheadAttention) for w in _inputs(m)
    }
    parameters = dict(model.named_parameters())
    candidates: list[Consumer] = []
    for name, dims in graph.bindings.items():
        if (weight := parameters.get(name)) is None or weight.dim() < 2:
            continue
        if modules := layers.get(id(weight)):
            candidates += _layer(name, weight, dims, modules)
        elif attention := attentions.get(id(weight)):
            candidates += _projections(name, weight, dims, attention)
    return [consumer for consumer in candidates if np.isin(consumer.units, graph.prunable).any()]


def _inputs(attention: nn.MultiheadAttention) -> list[Tensor | None]:
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [stored_tensor(attention, name) for name in names]


def _layer(
    name: str, weight: Tensor, dims: Mapping[int, Units], modules: list[nn.Module]
) -> Iterator[Consumer]:
    dim = 0 if isinstance(modules[0], _ConvTransposeNd) else 1
    if dim in dims:
        groups = modules[0].groups if isinstance(modules[0], _ConvNd) else 1
        yield Consumer(f"{name}:{dim}", weight, dim, groups, dims[dim], tuple(modules))


def _projections(
    name: str, weight: Tensor, dims: Mapping[int, Units], attention: nn.MultiheadAttention
) -> Iterator[Consumer]:
    """Yield the projections of queries, keys and values; that of the outputs is a linear layer of its own."""
    if 1 not in dims:
        return
    stacked, *separate = _inputs(attention)
    if weight is stacked:
        parts = list(zip(_ATTENTION_INPUTS, weight.chunk(3), strict=True))
    else:
        parts = [(read, w) for read, w in zip(_ATTENTION_INPUTS, separate, strict=True) if w is weight]
    for read, rows_of_part in parts:
        yield Consumer(f"{name}:1:{read}", rows_of_part, 1, 1, dims[1], (attention,))


class ConsumerInputs(LayerMetrics):
    """Observer of the variance of each channel that the layers read: after norms, activations and concatenations.

    Layers whose module is not called (a network that passes its weight to a function) are not observed.

    Args:
        graph: the graph of ``model``.
        model: the traced module.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with ConsumerInputs(trace(net, torch.zeros(1, 1)), net) as inputs:
        ...     _ = net(torch.randn(8, 1))
        >>> {key: variances.shape for key, variances in inputs.compute().items()}
        {'2.weight:1': (2,)}
    """

    def __init__(self, graph: ChannelGraph, model: nn.Module) -> None:
        self.consumers = {consumer.key: consumer for consumer in find_consumers(graph, model)}
        self._attentions = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        super().__init__({key: ChannelVariance().to(c.weight.device) for key, c in self.consumers.items()})

    def register_hooks(self) -> Iterable[RemovableHandle]:
        """Register the forward hooks and return their handles."""
        for key, consumer in self.consumers.items():
            for module in consumer.modules:
                if isinstance(module, nn.MultiheadAttention):
                    hook = partial(self._observe_projection, key)
                    yield module.register_forward_pre_hook(hook, with_kwargs=True)
                elif module in self._attentions:
                    heads = partial(self._observe_heads, key)
                    yield self._attentions[module].register_forward_hook(heads, with_kwargs=True)
                else:
                    yield module.register_forward_pre_hook(partial(self._observe, key), with_kwargs=True)

    @torch.no_grad()
    def _observe(self, key: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.active:
            x = args[0] if args else kwargs["input"]
            self.metrics[key].update(channels_second(module, x))

    @torch.no_grad()
    def _observe_projection(self, key: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.active:
            arguments = _ATTENTION_ARGUMENTS.bind(module, *args, **kwargs).arguments
            self._add_tokens(key, arguments[key.rpartition(":")[2]])

    @torch.no_grad()
    def _observe_heads(
        self, key: str, module: nn.MultiheadAttention, args: Any, kwargs: Any, output: Any
    ) -> None:
        if self.active:
            self._add_tokens(key, heads(module, lambda: module.forward(*args, **kwargs)[0]))

    def _add_tokens(self, key: str, x: Tensor) -> None:
        self.metrics[key].update(x.reshape(-1, x.shape[-1]))


def heads(attention: nn.MultiheadAttention, forward: Callable[[], Tensor]) -> Tensor:
    """Return what the projection of the outputs reads: run the attention with the identity in its place.

    The state of the random numbers (dropout) stays as it is.
    """
    device = next(attention.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with _identity(attention.out_proj), torch.random.fork_rng(devices):
        return forward()


@contextmanager
def _identity(layer: nn.Linear) -> Iterator[None]:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    eye = torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)
    zeros = None if bias is None else nn.Parameter(bias.new_zeros(layer.in_features), requires_grad=False)
    layer._parameters.update(weight=nn.Parameter(eye, requires_grad=False), bias=zeros)
    try:
        yield
    finally:
        layer._parameters.update(weight=weight, bias=bias)
