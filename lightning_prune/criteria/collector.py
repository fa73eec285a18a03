"""What the filters do on the data: per-filter statistics of activations, streamed while training (level 3).

:class:`ActivationDeviation` does the arithmetic, :class:`Collector` puts one such metric on every layer of a
graph. What a criterion receives in the end is plain: the qualified name of a weight -> one float64 per
filter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
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
from lightning_prune.utils.distributed import gathered

__all__ = [
    "Collector",
]


def owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Identity of a parameter -> the convolutions and linear layers that hold it; several if it is shared."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            found.setdefault(id(module._parameters.get("weight")), []).append(module)
    return found


def channels_second(module: nn.Module, output: Tensor) -> Tensor:
    """A layer's output as (N, C, ...): a linear layer has its channels last."""
    batchless = isinstance(module, nn.modules.conv._ConvNd) and output.dim() < module.weight.dim()
    output = output[None] if batchless or output.dim() < 2 else output
    return output.movedim(-1, 1) if isinstance(module, nn.Linear) else output


def fold(values: NDArray[np.float64], filters: int) -> NDArray[np.float64]:
    """Mean over groups: a grouped transposed layer has more output channels than its weight has filters."""
    return values.reshape(-1, filters).mean(0)


class Collector:
    """One metric for every layer that can lose filters, fed by forward hooks while it is attached and active.

    Use it as a context manager, or call :meth:`attach` and :meth:`detach`. A layer that runs several times in
    one forward counts each time. After a cut make a new collector: numbers of channels have changed.

    Args:
        graph: whose layers to watch.
        model: the traced module.
        statistic: makes a metric; its ``update`` gets (N, C, ...), its ``compute`` returns one value per
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
        self.active = True
        self.filters: dict[str, int] = {}
        self.metrics: dict[str, Metric] = {}
        self._modules: dict[str, list[nn.Module]] = {}
        self._handles: list[RemovableHandle] = []
        holders = owners(model)
        for name, units in graph.layers.items():
            modules = holders.get(id(model.get_parameter(name)), [])
            if modules and np.isin(units, graph.prunable).any():
                self.filters[name], self._modules[name] = len(units), modules
                self.metrics[name] = statistic().to(model.get_parameter(name).device)

    def attach(self) -> Collector:
        """Register the hooks."""
        self.detach()
        for name, modules in self._modules.items():
            hook = partial(self._observe, name)
            self._handles += [module.register_forward_hook(hook) for module in modules]
        return self

    def detach(self) -> None:
        """Remove the hooks; what was gathered stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forget what was gathered."""
        for metric in self.metrics.values():
            metric.reset()

    def state(self) -> dict[str, Any]:
        """What was gathered so far in this process, as tensors and plain values, for a checkpoint."""
        for metric in self.metrics.values():
            metric.persistent(True)
        return {
            name: {"updates": metric.update_count, "state": dict(metric.state_dict())}
            for name, metric in self.metrics.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            ValueError: it is of other layers.
        """
        if state.keys() != self.metrics.keys():
            raise ValueError(f"statistics of {sorted(state)}, but the layers are {sorted(self.metrics)}")
        for name, metric in self.metrics.items():
            metric.persistent(True)
            metric.load_state_dict(state[name]["state"])
            metric._update_count = state[name]["updates"]
            metric.to(metric.device)

    def compute(self) -> dict[str, NDArray[np.float64]]:
        """Values per filter of every layer that ran; in a distributed run, over all processes.

        Raises:
            ValueError: a layer's activations were not finite.
        """
        return {name: self._values(name) for name in self._seen()}

    def _seen(self) -> list[str]:
        """Layers that ran, in any process: all must take part in reducing what one of them saw."""
        here = {
            name: getattr(metric, "shape", None)
            for name, metric in self.metrics.items()
            if metric.update_called
        }
        ranks = gathered(here)
        seen = [name for name in self.metrics if any(name in rank for rank in ranks)]
        for name in seen if len(ranks) > 1 else ():
            shape = next(rank[name] for rank in ranks if name in rank)
            conform_ = getattr(self.metrics[name], "conform_", None)
            if shape is not None and conform_ is not None:
                conform_(shape)
        return seen

    def _observe(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.active:
            with torch.no_grad():
                self.metrics[name].update(channels_second(module, output.detach()))

    def _values(self, name: str) -> NDArray[np.float64]:
        with warnings.catch_warnings():  # a process that saw nothing of this layer still takes part
            warnings.filterwarnings("ignore", ".*was called before the ``update``")
            computed = self.metrics[name].compute()
        values = computed.detach().reshape(-1).cpu().numpy().astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"the activations of {name.removesuffix('.weight')!r} were NaN or infinite in this pass; "
                "nothing was pruned. If the loss diverges, lower the learning rate or clip gradients"
            )
        return fold(values, self.filters[name])

    def __enter__(self) -> Collector:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
