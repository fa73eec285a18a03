"""What a removed channel still said, folded into what follows (level 3).

A channel whose norm has a scale of 0 is not silent: it says its shift, whatever the input. Whoever reads it gets a
constant from it. What each layer gets from the inputs that it is about to lose is measured, by running the network
on a batch: the mean goes into the layer's bias, or from the running mean of the batch norm that follows. A second
run with those scales at 0 shows where that is exact: where the contribution is the same at every position, as in
linear layers and convolutions of one element or without padding. Where zero padding or a gate makes it vary, the
mean is the best constant. A layer with neither bias nor batch norm cannot take it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_tree import module_of
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.batch_norm import tracked_norms
from lightning_prune.utils.distributed import broadcast
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.modules import training_modes

__all__ = ["Folded", "MeasuredShifts", "Shift", "fold_", "outputs", "relative_change", "shifts"]

EXACT = 16  # rounding of so many units in the last place


@dataclass(frozen=True)
class Shift:
    """What the inputs that a layer loses contribute to its filters that stay.

    Attributes:
        layer: qualified name of the layer.
        values: mean contribution to each filter that stays, on the CPU.
        exact: whether it would be a constant, up to rounding, if the scales of what goes were 0.
        norm: the batch norm that reads the layer's output, if that comes next.
    """

    layer: str
    values: Tensor
    exact: bool
    norm: str | None


@dataclass(frozen=True)
class Folded:
    """How many layers took what they lost: exactly, as its mean, or not at all."""

    exact: int = 0
    nearly: int = 0
    lost: int = 0


@torch.no_grad()
def shifts(
    model: nn.Module, graph: ChannelGraph, scales: Mapping[str, Units], remove: Units, example: Example
) -> list[Shift]:
    """Measure what the units in ``remove`` say to the layers that read them.

    Args:
        model: before the cut; it is left as it is.
        graph: of ``model``.
        scales: qualified names of the norm scales that are about 0, with the unit of each channel.
        remove: the units.
        example: a batch, as the forward takes it.

    Returns:
        One for each layer that loses inputs and ran. Grouped convolutions that lose filters with their inputs
        have nothing to fold.
    """
    gone = ~graph.kept(remove)
    found, norms = _listen(model, graph, gone, example)
    with _silenced(model, scales, gone):
        silent, _ = _listen(model, graph, gone, example)
    return [
        Shift(name, rows.mean(0).cpu(), _constant(silent[name]), norms.get(name))
        for name, rows in found.items()
    ]


def _listen(
    model: nn.Module, graph: ChannelGraph, gone: NDArray[np.bool_], example: Example
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What each layer gets from what goes, one row per sample and position, and the norm that comes next."""
    found: dict[str, list[Tensor]] = {}
    names = {id(norm): name for name, norm in model.named_modules()}
    last: list[tuple[str, Tensor]] = []
    follows: dict[str, str] = {}

    def after(
        name: str, masks: tuple[Tensor, Tensor], layer: nn.Module, args: Any, named: Any, out: Tensor
    ) -> None:
        found.setdefault(name, []).append(_contribution(layer, args[0] if args else named["input"], *masks))
        last[:] = [(name, out)]

    def before(norm: nn.Module, args: Any) -> None:
        if last and args and args[0] is last[0][1]:
            follows[last[0][0]] = names[id(norm)]

    with ExitStack() as hooks:
        for name, masks in _readers(model, graph, gone):
            listener = partial(after, name, masks)
            hook = model.get_submodule(name).register_forward_hook(listener, with_kwargs=True)
            hooks.callback(hook.remove)
        for norm in tracked_norms(model):
            hooks.callback(norm.register_forward_pre_hook(before).remove)
        _run(model, example)
    return {name: torch.cat(rows) for name, rows in found.items()}, follows


def _constant(rows: Tensor) -> bool:
    """Whether all rows are the same, up to rounding."""
    if not rows.numel():
        return True
    size = max(float(rows.abs().max()), 1.0)
    return float((rows.amax(0) - rows.amin(0)).max()) <= EXACT * torch.finfo(rows.dtype).eps * size


def fold_(model: nn.Module, measured: list[Shift]) -> Folded:
    """Put what was measured before a cut into the layers of ``model``, after it.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1))
        >>> _ = nn.init.zeros_(layer[0].bias)
        >>> fold_(layer, [Shift("0", torch.tensor([0.5]), True, None)]), layer[0].bias.data
        (Folded(exact=1, nearly=0, lost=0), tensor([0.5000]))
    """
    count = {"exact": 0, "nearly": 0, "lost": 0}
    for shift in measured:
        taker = _taker(model, shift)
        if taker is None:
            count["lost"] += bool(shift.values.any())
            continue
        tensor, sign = taker
        tensor.data += sign * shift.values.to(tensor)
        count["exact" if shift.exact else "nearly"] += 1
    return Folded(**count)


def _taker(model: nn.Module, shift: Shift) -> tuple[Tensor, int] | None:
    """The tensor that takes the shift up, and with which sign."""
    bias = getattr(model.get_submodule(shift.layer), "bias", None)
    if isinstance(bias, Tensor):
        return bias, 1
    return (model.get_submodule(shift.norm).get_buffer("running_mean"), -1) if shift.norm else None


@torch.no_grad()
def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """The floating-point outputs of ``model`` in eval mode."""
    found = tree_leaves(_run(model, example))
    return [out.float() for out in found if isinstance(out, Tensor) and out.is_floating_point()]


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """``||after - before|| / ||before||`` over all outputs together; NaN if there are none.

    Example:
        >>> relative_change([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 3.0])])
        0.2
    """
    if not before:
        return math.nan
    squares = [
        ((a - b).double().square().sum(), b.double().square().sum())
        for b, a in zip(before, after, strict=True)
    ]
    change, size = (float(sum(side)) for side in zip(*squares, strict=True))
    return float((change / size) ** 0.5) if size > 0 else float(change > 0)


def _run(model: nn.Module, example: Example) -> Any:
    device = next(model.parameters()).device  # an average may lie elsewhere
    args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, example)
    with training_modes(model, lambda module: False), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


@contextmanager
def _silenced(model: nn.Module, scales: Mapping[str, Units], gone: NDArray[np.bool_]) -> Iterator[None]:
    """The scales of what goes at 0, and as they were afterwards."""
    held = [
        (model.get_parameter(name), torch.from_numpy((units >= 0) & gone[units]))
        for name, units in scales.items()
    ]
    before = [scale.detach().clone() for scale, _ in held]
    for scale, mask in held:
        scale.data[mask.to(scale.device)] = 0
    try:
        yield
    finally:
        for (scale, _), values in zip(held, before, strict=True):
            scale.data.copy_(values)


def _readers(
    model: nn.Module, graph: ChannelGraph, gone: NDArray[np.bool_]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Layers that lose inputs: name, which inputs go, which filters stay."""
    modules = dict(model.named_modules())
    for weight, filters in graph.layers.items():
        name, dim = module_of(weight), 1 - graph.filter_dims[weight]
        inputs = graph.bindings.get(weight, {}).get(dim)
        if inputs is not None and _mixes(modules.get(name)) and gone[inputs].any():
            yield name, (torch.from_numpy(gone[inputs]), torch.from_numpy(~gone[filters]))


def _mixes(layer: nn.Module | None) -> bool:
    """Whether each filter reads every input."""
    convolution = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1
    return convolution or isinstance(layer, nn.Linear)


def _contribution(layer: nn.Module, x: Tensor, inputs: Tensor, filters: Tensor) -> Tensor:
    """What some of the inputs alone contribute to some of the filters, one row per sample and position."""
    spatial = 0 if isinstance(layer, nn.Linear) else layer.get_parameter("weight").dim() - 2
    channels = x.dim() - 1 - spatial
    mask = inputs.to(x.device).view([-1 if dim == channels else 1 for dim in range(x.dim())])
    forward: Callable[[nn.Module, Tensor], Tensor] = type(layer).forward
    alone = forward(layer, x * mask)
    rows = alone.movedim(alone.dim() - 1 - spatial, -1).flatten(0, -2)
    if isinstance(bias := getattr(layer, "bias", None), Tensor):
        rows = rows - bias
    return rows[:, filters.to(rows.device)]


class MeasuredShifts:
    """What a cut is about to take away from a network and its averages, on one batch.

    Args:
        networks: the network itself, and averaged copies of it.
        graph: of the network before the cut.
        scales: see :func:`shifts`.
        remove: the units that are to go.
        example: a batch; None if there is none, then nothing can be folded.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        graph: ChannelGraph,
        scales: Mapping[str, Units],
        remove: Units,
        example: Example | None,
    ) -> None:
        self.networks, self.graph, self.remove, self.example = list(networks), graph, remove, example
        self.before = outputs(networks[0], example) if example else []
        found = [shifts(network, graph, scales, remove, example) if example else [] for network in networks]
        self.shifts = broadcast(found)

    def left(self, name: str, value: Tensor, removed: Units) -> Tensor:
        """What is left of a value per channel of the parameter ``name``."""
        kept = self.graph.kept(removed)[self.graph.bindings[name][0]]
        return value[torch.from_numpy(kept).to(value.device)]

    def fold_(self, removed: Units) -> Folded:
        """Fold into the networks, which are smaller now; not if another cut was made than was measured."""
        if not np.array_equal(np.sort(removed), np.sort(self.remove)):
            return Folded(lost=len(self.shifts[0]))
        folded = [fold_(network, each) for network, each in zip(self.networks, self.shifts, strict=True)]
        return folded[0]

    def change(self) -> float:
        """:func:`relative_change` of the network's outputs since then; NaN if there was no batch."""
        return (
            relative_change(self.before, outputs(self.networks[0], self.example))
            if self.example
            else math.nan
        )
