"""Measure the constant contribution of removed channels to the layers that read them.

A channel whose norm has a scale of 0 still outputs its shift, for every input. The layers that read it receive a
constant: the mean of what the removed inputs contribute to each layer when the network runs on a batch.

A second run, with the scales of the removed channels set to 0, shows where this is exact: where the contribution is
the same at every position, as in linear layers and in convolutions that have a kernel of one element or no padding.
Where zero padding or a gate makes the contribution vary, the mean is the best constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.batch_norm import tracked_norms
from lightning_prune.utils.example_inputs import Example, on_device
from lightning_prune.utils.modules import training_modes

__all__ = ["Shift", "forward_in_eval_mode", "shifts"]

EXACT_TOLERANCE = 16  # largest rounding error of a constant, in multiples of the machine epsilon


@dataclass(frozen=True)
class Shift:
    """The contribution of a layer's removed inputs to its kept filters.

    Attributes:
        layer: qualified name of the layer.
        values: mean contribution to each kept filter, shape (kept filters,), on the CPU.
        exact: whether the contribution is constant, up to rounding, when the removed channels' scales are 0.
        norm: the batch norm that reads the layer's output, if it comes next.
    """

    layer: str
    values: Tensor
    exact: bool
    norm: str | None


@torch.no_grad()
def shifts(
    model: nn.Module, graph: ChannelGraph, scales: Mapping[str, Units], remove: Units, example: Example
) -> list[Shift]:
    """Measure the contribution of the units in ``remove`` to the layers that read them.

    Args:
        model: the network before the cut; it is not changed.
        graph: the graph of ``model``.
        scales: qualified names of the norm scales that are about 0, with the unit of each channel.
        remove: the units to remove.
        example: a batch, as positional and keyword arguments of the forward.

    Returns:
        One shift for each layer that ran and loses inputs. Grouped convolutions that lose filters together with
        their inputs have nothing to fold.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))
        >>> net[1].weight.data, net[1].bias.data = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])
        >>> net[3].weight.data = torch.tensor([[1.0, 3.0]])
        >>> units = (graph := trace(net, torch.zeros(4, 1))).layers["0.weight"]
        >>> (shift,) = shifts(net, graph, {"1.weight": units}, units[1:], ((torch.randn(4, 1),), {}))
        >>> shift.layer, shift.values, shift.exact
        ('3', tensor([1.5000]), True)
    """
    removed = ~graph.kept(remove)
    contributions, norms = _measure_contributions(model, graph, removed, example)
    # With scales of exactly 0, only padding and gates can still make a contribution vary.
    with _zero_scales(model, scales, removed):
        contributions_at_zero, _ = _measure_contributions(model, graph, removed, example)
    return [
        Shift(name, rows.mean(0).cpu(), _is_constant(contributions_at_zero[name]), norms.get(name))
        for name, rows in contributions.items()
    ]


def _measure_contributions(
    model: nn.Module, graph: ChannelGraph, removed: NDArray[np.bool_], example: Example
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Measure what each layer receives from its removed inputs in one forward.

    Returns:
        Layer -> contributions, shape (samples * positions, kept filters); and layer -> the batch norm that reads its
        output.
    """
    contributions: dict[str, list[Tensor]] = {}
    names = {id(norm): name for name, norm in model.named_modules()}
    last_output: list[tuple[str, Tensor]] = []
    next_norms: dict[str, str] = {}

    def after_layer(
        name: str, masks: tuple[Tensor, Tensor], layer: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        x = args[0] if args else kwargs["input"]
        contributions.setdefault(name, []).append(_contribution(layer, x, *masks))
        last_output[:] = [(name, output)]

    def before_norm(norm: nn.Module, args: Any) -> None:
        # The same tensor object: nothing lies between the layer and the norm.
        if last_output and args and args[0] is last_output[0][1]:
            next_norms[last_output[0][0]] = names[id(norm)]

    with ExitStack() as hooks:
        for name, masks in _layers_with_removed_inputs(model, graph, removed):
            hook = partial(after_layer, name, masks)
            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for norm in tracked_norms(model):
            hooks.callback(norm.register_forward_pre_hook(before_norm).remove)
        forward_in_eval_mode(model, example)
    return {name: torch.cat(rows) for name, rows in contributions.items()}, next_norms


def _is_constant(rows: Tensor) -> bool:
    """Whether all rows are equal, up to rounding."""
    if not rows.numel():
        return True
    size = max(float(rows.abs().max()), 1.0)
    return float((rows.amax(0) - rows.amin(0)).max()) <= EXACT_TOLERANCE * torch.finfo(rows.dtype).eps * size


@contextmanager
def _zero_scales(model: nn.Module, scales: Mapping[str, Units], removed: NDArray[np.bool_]) -> Iterator[None]:
    """Set the scales of the removed units to 0 inside the context, and restore them afterwards."""
    parameters = {name: model.get_parameter(name) for name in scales}
    saved = {name: scale.detach().clone() for name, scale in parameters.items()}
    for name, scale in parameters.items():
        units = scales[name]
        mask = torch.from_numpy((units >= 0) & removed[units])
        scale.data[mask.to(scale.device)] = 0
    try:
        yield
    finally:
        for name, scale in parameters.items():
            scale.data.copy_(saved[name])


def _layers_with_removed_inputs(
    model: nn.Module, graph: ChannelGraph, removed: NDArray[np.bool_]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield the name of each layer that loses inputs, with the masks of its removed inputs and its kept filters."""
    modules = dict(model.named_modules())
    for weight, filters in graph.layers.items():
        name, dim = module_of(weight), 1 - graph.filter_dims[weight]
        inputs = graph.bindings.get(weight, {}).get(dim)
        if inputs is not None and _mixes_channels(modules.get(name)) and removed[inputs].any():
            yield name, (torch.from_numpy(removed[inputs]), torch.from_numpy(~removed[filters]))


def _mixes_channels(layer: nn.Module | None) -> bool:
    """Whether each filter of ``layer`` reads every input channel."""
    is_dense_convolution = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1
    return is_dense_convolution or isinstance(layer, nn.Linear)


def _contribution(layer: nn.Module, x: Tensor, inputs: Tensor, filters: Tensor) -> Tensor:
    """Compute what the masked ``inputs`` alone contribute to the masked ``filters`` of ``layer``, without its bias.

    Returns:
        Shape (samples * positions, filters in the mask).
    """
    spatial_dims = len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else 0
    channel_dim = x.dim() - 1 - spatial_dims
    mask = inputs.to(x.device).view([-1 if dim == channel_dim else 1 for dim in range(x.dim())])
    # The forward of the class: calling the layer itself would run the measuring hook again.
    forward: Callable[[nn.Module, Tensor], Tensor] = type(layer).forward
    output = forward(layer, x * mask)
    rows = output.movedim(output.dim() - 1 - spatial_dims, -1).flatten(0, -2)
    if isinstance(bias := getattr(layer, "bias", None), Tensor):
        rows = rows - bias
    return rows[:, filters.to(rows.device)]


def forward_in_eval_mode(model: nn.Module, example: Example) -> Any:
    """Run ``model`` in eval mode, without compiled code, on the device of its parameters."""
    device = next(model.parameters()).device  # an averaged copy may be on another device than the batch
    args, kwargs = on_device(example, device)
    with training_modes(model, lambda module: False), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)
