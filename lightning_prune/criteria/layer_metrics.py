"""Base class of observers that keep one streaming metric per key: checkpoints and distributed runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_prune.utils.distributed import gather_all

__all__ = ["LayerMetrics", "layers_by_weight"]


def layers_by_weight(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Map the identity of a weight to the convolutions and linear layers that hold it; several if it is shared.

    Of a computed weight (weight norm, spectral norm, other parametrisations) it is the stored tensor of its shape.
    """
    layers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            layers.setdefault(id(_stored_weight(module)), []).append(module)
    return layers


def _stored_weight(module: nn.Module) -> Tensor | None:
    """Return the weight, or the largest of the parameters that it is computed from."""
    if (weight := module._parameters.get("weight")) is not None:
        return weight
    computed = module._modules.get("parametrizations")
    originals = computed._modules.get("weight") if isinstance(computed, nn.ModuleDict) else None
    # The older weight_norm and spectral_norm of torch keep weight_g and weight_v, or weight_orig, in the module.
    stored = originals._parameters if originals is not None else module._parameters
    parts = [tensor for name, tensor in stored.items() if tensor is not None and not name.startswith("bias")]
    return max(parts, key=torch.numel, default=None)


#: what torchmetrics binds to each metric; its functions cannot be pickled
_METHODS = {"update", "compute", "_update_signature"}


class LayerMetrics:
    """Base class of observers with one metric per key, which forward hooks feed while attached and active.

    Use one as a context manager, or call :meth:`attach` and :meth:`detach`. If a layer runs several times in one
    forward, every call is observed. After a cut make a new observer, since numbers of channels have changed.

    Args:
        metrics: by key; the part of a key before the first colon is the qualified name of a weight. A metric with an
            attribute ``shape`` and a method ``conform_(shape)`` can be reduced over processes of which some did not
            run the layer.
    """

    observes_steps = False

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.active = True
        self.metrics = dict(metrics)
        self._handles: list[RemovableHandle] = []
        self._marked: dict[str, dict[str, Any]] = {}

    def register_hooks(self) -> Iterable[RemovableHandle]:
        """Register the forward hooks and return their handles."""
        raise NotImplementedError

    def attach(self) -> Self:
        """Register the forward hooks."""
        self.detach()
        self._handles += self.register_hooks()
        return self

    def detach(self) -> None:
        """Remove the hooks; keep the statistics."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_step(self, parameters: Iterable[Tensor]) -> None:
        """Do nothing: gradients are not observed."""

    def mark(self) -> None:
        """Remember the present statistics for :meth:`rewind`; metrics must replace their states, not change them."""
        self._marked = {
            name: {key: value for key, value in vars(metric).items() if key not in _METHODS}
            for name, metric in self.metrics.items()
        }

    def rewind(self) -> None:
        """Go back to the statistics of the last :meth:`mark`."""
        for name, attributes in self._marked.items():
            vars(self.metrics[name]).update(attributes)

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
        """Return values per channel of every layer that ran, over all processes of a distributed run.

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

    def _values(self, name: str) -> NDArray[np.float64]:
        with warnings.catch_warnings():  # a process that did not run this layer still takes part
            warnings.filterwarnings("ignore", ".*was called before the ``update``")
            computed = self.metrics[name].compute()
        values = computed.detach().reshape(-1).cpu().numpy().astype(np.float64)
        if not np.isfinite(values).all():
            layer = name.partition(":")[0].removesuffix(".weight")
            raise ValueError(
                f"the activations of {layer!r} were NaN or infinite in this pass; "
                "nothing was pruned. If the loss diverges, lower the learning rate or clip gradients"
            )
        return values

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
