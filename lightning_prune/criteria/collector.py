"""Observer of activations: one streaming metric per layer, fed by forward hooks.

A criterion receives plain arrays: the qualified name of a weight -> one float64 per filter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_prune.criteria.activation_deviation import ActivationDeviation
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.utils.distributed import gather_all

__all__ = ["Collector"]


def layers_by_weight(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Map the identity of a weight to the convolutions and linear layers that hold it; several if it is shared."""
    layers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            layers.setdefault(id(module._parameters.get("weight")), []).append(module)
    return layers


def channels_second(module: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's output as (N, C, ...); a linear layer has its channels last."""
    batchless = isinstance(module, nn.modules.conv._ConvNd) and output.dim() < module.weight.dim()
    output = output[None] if batchless or output.dim() < 2 else output
    return output.movedim(-1, 1) if isinstance(module, nn.Linear) else output


def mean_over_groups(values: NDArray[np.float64], filters: int) -> NDArray[np.float64]:
    """Average over groups: a grouped transposed layer has more output channels than its weight has filters."""
    return values.reshape(-1, filters).mean(0)


class Collector:
    """Observer with one metric for every layer that can lose filters, fed by forward hooks while attached and active.

    Use it as a context manager, or call :meth:`attach` and :meth:`detach`. If a layer runs several times in one
    forward, every call is observed. After a cut make a new collector, since numbers of channels have changed.

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

    observes_steps = False

    def __init__(
        self, graph: ChannelGraph, model: nn.Module, statistic: Callable[[], Metric] = ActivationDeviation
    ) -> None:
        self.active = True
        self.filters: dict[str, int] = {}
        self.metrics: dict[str, Metric] = {}
        self._modules: dict[str, list[nn.Module]] = {}
        self._handles: list[RemovableHandle] = []
        layers = layers_by_weight(model)
        for name, units in graph.layers.items():
            modules = layers.get(id(model.get_parameter(name)), [])
            if modules and np.isin(units, graph.prunable).any():
                self.filters[name], self._modules[name] = len(units), modules
                self.metrics[name] = statistic().to(model.get_parameter(name).device)

    def attach(self) -> Collector:
        """Register the forward hooks."""
        self.detach()
        for name, modules in self._modules.items():
            hook = partial(self._observe, name)
            self._handles += [module.register_forward_hook(hook) for module in modules]
        return self

    def detach(self) -> None:
        """Remove the hooks; keep the statistics."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_step(self, parameters: Iterable[Tensor]) -> None:
        """Do nothing: gradients are not observed."""

    def reset(self) -> None:
        """Discard the statistics."""
        for metric in self.metrics.values():
            metric.reset()

    def state(self) -> dict[str, Any]:
        """Return the statistics of this process as tensors and plain values, for a checkpoint."""
        for metric in self.metrics.values():
            metric.persistent(True)
        return {
            name: {"updates": metric.update_count, "state": dict(metric.state_dict())}
            for name, metric in self.metrics.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: the state belongs to other layers.
        """
        if state.keys() != self.metrics.keys():
            raise ValueError(f"statistics of {sorted(state)}, but the layers are {sorted(self.metrics)}")
        for name, metric in self.metrics.items():
            metric.persistent(True)
            metric.load_state_dict(state[name]["state"])
            metric._update_count = state[name]["updates"]
            metric.to(metric.device)

    def compute(self) -> dict[str, NDArray[np.float64]]:
        """Return values per filter of every layer that ran, over all processes of a distributed run.

        Raises:
            ValueError: a layer's activations were not finite.
        """
        return {name: self._values(name) for name in self._observed_layers()}

    def _observed_layers(self) -> list[str]:
        """Return the layers that ran in any process: all processes take part in their reduction."""
        local_shapes = {
            name: getattr(metric, "shape", None)
            for name, metric in self.metrics.items()
            if metric.update_called
        }
        ranks = gather_all(local_shapes)
        observed = [name for name in self.metrics if any(name in rank for rank in ranks)]
        for name in observed if len(ranks) > 1 else ():
            shape = next(rank[name] for rank in ranks if name in rank)
            conform_ = getattr(self.metrics[name], "conform_", None)
            if shape is not None and conform_ is not None:
                conform_(shape)
        return observed

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.active:
            with torch.no_grad():
                self.metrics[name].update(channels_second(module, output.detach()))

    def _values(self, name: str) -> NDArray[np.float64]:
        with warnings.catch_warnings():  # a process that did not run this layer still takes part
            warnings.filterwarnings("ignore", ".*was called before the ``update``")
            computed = self.metrics[name].compute()
        values = computed.detach().reshape(-1).cpu().numpy().astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"the activations of {name.removesuffix('.weight')!r} were NaN or infinite in this pass; "
                "nothing was pruned. If the loss diverges, lower the learning rate or clip gradients"
            )
        return mean_over_groups(values, self.filters[name])

    def __enter__(self) -> Collector:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
