"""The oracle of norms across channels: the dense network, whose statistics leave the removed channels out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.testing.oracles import zeroed_copy
from lightning_prune.utils.modules import named_tensors

__all__ = ["with_masked_statistics"]

aten = torch.ops.aten
Result = Tensor | tuple[Tensor, ...]
#: (channels, values) -> mask over channels
Present = Callable[[Tensor], Tensor]


def with_masked_statistics(
    model: nn.Module, graph: ChannelGraph, remove: Iterable[int], leave_out_equal: bool = False
) -> nn.Module:
    """Return the dense network with zeros for the removed units, whose statistics across channels leave these out.

    All parameters and buffers of the removed units are zero, of filters as well as of the weights that read them.
    Whatever takes statistics over a dimension in which whole channels are zero (layer, group and RMS norm, mean,
    variance, maximum, softmax) takes them over the other channels only. So this oracle holds for
    ``graph.statistics_units`` too, if removed channels are zero where statistics are taken (no activation with
    f(0) != 0 comes before), and if no kept channel is zero everywhere.

    Args:
        model: the dense network, before :func:`~lightning_prune.prune_`, or a copy of it.
        graph: of the dense network.
        remove: numbers of the units to remove.
        leave_out_equal: leave out channels that equal another one, too: where the code adds the same to all channels
            (positions, a mask), removed ones are not zero, but equal. At least two have to be removed then.

    Returns:
        A network to be called as the dense one, without gradients.

    Example:
        >>> import copy
        >>> import lightning_prune as lp
        >>> from lightning_prune.testing import error
        >>> dense = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double()
        >>> pruned, x = copy.deepcopy(dense), torch.randn(4, 3).double()
        >>> graph = lp.trace(pruned, x)
        >>> record = lp.prune_(pruned, graph, remove=[0, 5])
        >>> error(with_masked_statistics(dense, graph, [0, 5]), pruned, x) < 1e-12
        True
    """
    tensors = named_tensors(model)
    twin = zeroed_copy(model, graph, remove, lambda name, dim: tensors[name].is_floating_point())
    return _MaskedStatistics(twin, _distinct if leave_out_equal else _nonzero)


class _MaskedStatistics(nn.Module):
    """Run a network, with statistics over those channels that ``present`` finds."""

    def __init__(self, network: nn.Module, present: Present) -> None:
        super().__init__()
        self.network, self.present = network, present

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the outputs of the network."""
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # has its layer norms inside one operator
        try:
            with torch.no_grad(), _StatisticsMode(self.present):
                return self.network(*inputs, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


class _StatisticsMode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, present: Present) -> None:
        super().__init__()
        self.present = present

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = RULES.get(func)
        return rule(self, func, *args, **(kwargs or {})) if rule else func(*args, **(kwargs or {}))

    def mask(self, x: Tensor, dims: Iterable[int], weight: Tensor | None = None) -> Tensor:
        """Return a mask that broadcasts to ``x``, False for what statistics over these dimensions leave out.

        They leave out channels that are not present, and those that ``weight`` multiplies by zero.
        """
        mask = torch.ones((1,) * x.dim(), dtype=torch.bool)
        for dim in dims:
            channels = x.movedim(dim, 0).reshape(x.shape[dim], -1)
            found = self.present(channels)
            shape = [1] * x.dim()
            shape[dim] = len(found)
            mask = mask & (found if found.any() else torch.ones_like(found)).view(shape)
        return mask if weight is None else mask & (weight != 0)


def _nonzero(channels: Tensor) -> Tensor:
    """Return which rows of (channels, values) have a value that is not zero."""
    return (channels != 0).any(dim=1)


def _distinct(channels: Tensor) -> Tensor:
    """Return which rows of (channels, values) are not zero, and equal no other row."""
    _, numbers, counts = torch.unique(channels, dim=0, return_inverse=True, return_counts=True)
    return _nonzero(channels) & (counts[numbers] == 1)


def _dims(x: Tensor, dim: Any) -> list[int]:
    """Return the dimensions that an argument names, counted from 0; all for None and an empty sequence."""
    chosen = [dim] if isinstance(dim, int) else dim or range(x.dim())
    return [d % max(x.dim(), 1) for d in chosen]


def _moments(x: Tensor, dims: list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance over ``dims`` of the elements in the mask, with these dimensions."""
    mask = mask.expand(x.shape).to(x.dtype)
    number = mask.sum(dims, keepdim=True).clamp_min(1)
    mean = (x * mask).sum(dims, keepdim=True) / number
    return mean, ((x - mean) ** 2 * mask).sum(dims, keepdim=True) / number


def _normalised(x: Tensor, dims: list[int], mask: Tensor, eps: float) -> Tensor:
    mean, variance = _moments(x, dims, mask)
    return (x - mean) * (variance + eps).rsqrt() * mask


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a parameter in a shape that broadcasts along the channels of ``x``, dimension 1."""
    return None if parameter is None else parameter.view(1, -1, *[1] * (x.dim() - 2))


def _layer_norm(
    mode: _StatisticsMode,
    func: Any,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Result:
    dims = list(range(x.dim() - len(shape), x.dim()))
    out = _normalised(x, dims, mode.mask(x, dims, weight), eps)
    return _scaled(out, weight, bias), x.new_zeros(1), x.new_zeros(1)


def _group_norm(
    mode: _StatisticsMode,
    func: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    size: int,
    groups: int,
    eps: float,
) -> Result:
    weight, bias = _per_channel(weight, x), _per_channel(bias, x)
    parts, mask = (t.reshape(n, groups, -1) for t in (x, mode.mask(x, [1], weight).expand(x.shape)))
    out = _normalised(parts, [2], mask, eps).reshape(x.shape)
    return _scaled(out, weight, bias), x.new_zeros(1), x.new_zeros(1)


def _batch_norm(
    mode: _StatisticsMode,
    func: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *args: Any,
) -> Any:
    """Normalise each channel by its own statistics, as the standardisation of a kernel does."""
    training, eps = args[-3], args[-1]
    dims = [d for d in range(x.dim()) if d != 1]
    mask = mode.mask(x, dims)
    if not training or bool(mask.all()):
        return func(x, weight, bias, *args)
    out = _scaled(_normalised(x, dims, mask, eps), _per_channel(weight, x), _per_channel(bias, x))
    return out, x.new_zeros(0), x.new_zeros(0)


def _rms_norm(
    mode: _StatisticsMode, func: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None
) -> Result:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mask = mode.mask(x, dims, weight)
    mean, variance = _moments(x * mask, dims, mask)
    scale = (variance + mean**2 + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return x * scale * (1 if weight is None else weight), scale


def _mean(
    mode: _StatisticsMode, func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    dims = _dims(x, dim)
    mean = _moments(x, dims, mode.mask(x, dims))[0]
    return mean if keepdim else _squeezed(mean, dims)


def _squeezed(x: Tensor, dims: list[int]) -> Tensor:
    return x.reshape([size for d, size in enumerate(x.shape) if d not in dims])


def _variance(
    mode: _StatisticsMode,
    func: Any,
    x: Tensor,
    dim: Any = None,
    *,
    correction: Any = 1,
    keepdim: bool = False,
) -> Result:
    dims = _dims(x, dim)
    mask = mode.mask(x, dims)
    mean, variance = _moments(x, dims, mask)
    number = mask.expand(x.shape).sum(dims, keepdim=True)
    variance = variance * number / (number - (1 if correction is None else correction))
    mean, variance = (t if keepdim else _squeezed(t, dims) for t in (mean, variance))
    name = func._opname
    return (variance if name == "var" else variance.sqrt()) if "mean" not in name else (variance, mean)


def _without_zeros(
    mode: _StatisticsMode, func: Any, x: Tensor, dim: Any = (), *args: Any, **kwargs: Any
) -> Any:
    """Call a maximum or softmax with minus infinity in place of the channels that are zero."""
    mask = mode.mask(x, _dims(x, dim))
    return func(x if bool(mask.all()) else x.masked_fill(~mask, -torch.inf), dim, *args, **kwargs)


RULES: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm,
    aten._fused_rms_norm.default: _rms_norm,
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.var.correction: _variance,
    aten.std.correction: _variance,
    aten.var_mean.correction: _variance,
    aten._softmax.default: _without_zeros,
    aten._log_softmax.default: _without_zeros,
    aten.amax.default: _without_zeros,
    aten.max.dim: _without_zeros,
}
