"""Observer of layers' outputs: one streaming metric per layer, fed by forward hooks.

A criterion receives plain arrays: the qualified name of a weight -> one float64 per filter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_prune.criteria.activation_deviation import ActivationDeviation
from lightning_prune.criteria.layer_metrics import LayerMetrics, layers_by_weight
from lightning_prune.graph.channel_graph import ChannelGraph

__all__ = ["Collector"]


def channels_second(module: nn.Module, activation: Tensor) -> Tensor:
    """Return a layer's input or output as (N, C, ...); a linear layer has its channels last."""
    # Not by the weight: a parametrised one is computed whenever it is read.
    batchless = isinstance(module, _ConvNd) and activation.dim() < len(module.kernel_size) + 2
    activation = activation[None] if batchless or activation.dim() < 2 else activation
    return activation.movedim(-1, 1) if isinstance(module, nn.Linear) else activation


def mean_over_groups(values: NDArray[np.float64], filters: int) -> NDArray[np.float64]:
    """Average over groups: a grouped transposed layer has more output channels than its weight has filters."""
    return values.reshape(-1, filters).mean(0)


class Collector(LayerMetrics):
    """Observer with one metric for the output of every layer that can lose filters.

    See :class:`~lightning_prune.criteria.layer_metrics.LayerMetrics` for its use.

    Args:
        graph: the graph of ``model``, with the layers to observe.
        model: the traced module.
        statistic: returns a new metric; its ``update`` takes (N, C, ...), its ``compute`` returns one value per
            channel.

    Example:
        >>> import numpy as np
        >>> units = np.arange(4)
        >>> graph = ChannelGraph(4, {}, {"0.weight": units}, {"0.weight": 0}, {}, {})
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3))
        >>> with Collector(graph, model) as collector:
        ...     _ = model(torch.zeros(2, 3, 8, 8))
        >>> collector.compute()
        {'0.weight': array([...])}
    """

    def __init__(
        self, graph: ChannelGraph, model: nn.Module, statistic: Callable[[], Metric] = ActivationDeviation
    ) -> None:
        self.filters: dict[str, int] = {}
        self._modules: dict[str, list[nn.Module]] = {}
        metrics, layers = {}, layers_by_weight(model)
        for name, units in graph.layers.items():
            modules = layers.get(id(model.get_parameter(name)), [])
            if modules and np.isin(units, graph.prunable).any():
                self.filters[name], self._modules[name] = len(units), modules
                metrics[name] = statistic().to(model.get_parameter(name).device)
        super().__init__(metrics)

    def register_hooks(self) -> Iterable[RemovableHandle]:
        """Register the forward hooks and return their handles."""
        for name, modules in self._modules.items():
            hook = partial(self._observe, name)
            yield from [module.register_forward_hook(hook) for module in modules]

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.active:
            with torch.no_grad():
                self.metrics[name].update(channels_second(module, output.detach()))

    def _values(self, name: str) -> NDArray[np.float64]:
        return mean_over_groups(super()._values(name), self.filters[name])
