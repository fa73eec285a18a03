"""Results of common operators on meta tensors, computed without torch's own shape functions.

On meta tensors torch runs decompositions that are written in Python: they take half a millisecond for a batch
norm, which was most of the time of a trace. The functions here give the same shape, stride and dtype within
microseconds. Where a case is not clearly covered they return ``NotImplemented``, and torch is called. The tests
compare each function with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["SHAPE_FUNCTIONS", "infer"]

aten = torch.ops.aten
_META = torch.device("meta")
ShapeFunction = Callable[..., Any]
SHAPE_FUNCTIONS: dict[OpOverload, ShapeFunction] = {}


def infer(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of ``operator`` on meta tensors; ``NotImplemented`` if torch must compute it."""
    function = SHAPE_FUNCTIONS.get(operator)
    return NotImplemented if function is None else function(*args, **kwargs)


def _shape_function(*operators: OpOverload) -> Callable[[ShapeFunction], ShapeFunction]:
    """Register a shape function for ``operators``."""

    def register(function: ShapeFunction) -> ShapeFunction:
        SHAPE_FUNCTIONS.update(dict.fromkeys(operators, function))
        return function

    return register


@_shape_function(
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.tanh.default,
)
def _activation(x: Tensor, *options: Any, **kwargs: Any) -> Any:
    return _empty_like(x) if x.is_floating_point() and _is_dense(x) else NotImplemented


@_shape_function(
    aten.relu_.default,
    aten.gelu_.default,
    aten.silu_.default,
    aten.leaky_relu_.default,
    aten.hardtanh_.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
)
def _inplace_activation(x: Tensor, *options: Any, **kwargs: Any) -> Any:
    return x if x.is_floating_point() else NotImplemented


@_shape_function(aten.add_.Tensor, aten.mul_.Tensor)
def _inplace_binary(x: Tensor, y: Any, **scale: Any) -> Any:
    same = isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype and x.is_floating_point()
    return x if same and _is_dense(x) else NotImplemented


@_shape_function(aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
def _binary(x: Tensor, y: Any, **scale: Any) -> Any:
    if not isinstance(y, Tensor) or not x.is_floating_point() or x.dtype != y.dtype:
        return NotImplemented
    if x.shape == y.shape:
        return _empty_like(x) if x.stride() == y.stride() and _is_dense(x) else NotImplemented
    # Only one may be broadcast, both contiguous: other cases have strides that are not worth repeating here.
    wide, narrow = (x, y) if x.numel() >= y.numel() else (y, x)
    if narrow.dim() > wide.dim() or not wide.is_contiguous() or not narrow.is_contiguous():
        return NotImplemented
    sizes = zip(reversed(wide.shape), reversed(narrow.shape), strict=False)
    return _empty(wide, wide.shape) if all(b in (1, a) for a, b in sizes) else NotImplemented


@_shape_function(aten.convolution.default)
def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *options: Any
) -> Any:
    transposed, _, groups = options
    rank = weight.dim() - 2
    if transposed or x.dim() != weight.dim() or {rank} != {len(stride), len(padding), len(dilation)}:
        return NotImplemented
    fits = x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0 and x.is_contiguous()
    same_type = _is_full_precision(x) and x.dtype == weight.dtype and (bias is None or x.dtype == bias.dtype)
    if not fits or not same_type or _misfits(bias, weight.shape[:1]):
        return NotImplemented
    kernels = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in kernels]
    shape = [x.shape[0], weight.shape[0], *sizes]
    return _empty(x, shape) if min(*shape, *x.shape, *weight.shape) > 0 else NotImplemented


@_shape_function(aten.mean.dim)
def _mean(x: Tensor, dims: Any, keepdim: bool = False, dtype: Any = None) -> Any:
    if not dims or dtype is not None or not _is_full_precision(x) or not x.is_contiguous():
        return NotImplemented
    if not all(-x.dim() <= dim < x.dim() for dim in dims):
        return NotImplemented
    reduced = {dim % x.dim() for dim in dims}
    if len(reduced) != len(dims):
        return NotImplemented
    kept = [1 if dim in reduced else size for dim, size in enumerate(x.shape)]
    return _empty(x, kept if keepdim else [size for dim, size in enumerate(kept) if dim not in reduced])


@_shape_function(aten.cat.default)
def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    first, *rest = tensors
    dim = dim % max(first.dim(), 1)
    other_sizes = (first.shape[:dim], first.shape[dim + 1 :])
    for tensor in rest:
        if (tensor.shape[:dim], tensor.shape[dim + 1 :]) != other_sizes or tensor.dtype != first.dtype:
            return NotImplemented
    if not first.dim() or not all(tensor.is_contiguous() for tensor in tensors):
        return NotImplemented
    total = sum(tensor.shape[dim] for tensor in tensors)
    return _empty(first, [*other_sizes[0], total, *other_sizes[1]])


@_shape_function(aten.native_batch_norm.default)
def _batch_norm(x: Tensor, *args: Any) -> Any:
    *parameters, _training, _momentum, _eps = args
    if (
        not _is_full_precision(x)
        or x.dim() < 2
        or not _is_dense(x)
        or any(_misfits(tensor, x.shape[1:2]) for tensor in parameters)
    ):
        return NotImplemented
    return _empty_like(x), _empty(x, x.shape[1:2]), _empty(x, x.shape[1:2])


@_shape_function(aten.native_layer_norm.default)
def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    first_dim = x.dim() - len(shape)
    normalized = x.shape[first_dim:]
    if not _is_full_precision(x) or torch.Size(shape) != normalized:
        return NotImplemented
    if _misfits(weight, normalized) or _misfits(bias, normalized):
        return NotImplemented
    statistics = [*x.shape[:first_dim], *([1] * len(shape))]
    return _empty(x, x.shape), _empty(x, statistics), _empty(x, statistics)


@_shape_function(aten.native_group_norm.default)
def _group_norm(
    x: Tensor, weight: Any, bias: Any, n: int, c: int, positions: int, groups: int, eps: float
) -> Any:
    fits = _is_full_precision(x) and x.is_contiguous() and c % groups == 0 and [n, c] == list(x.shape[:2])
    if not fits or n * c * positions != x.numel():
        return NotImplemented
    if _misfits(weight, x.shape[1:2]) or _misfits(bias, x.shape[1:2]):
        return NotImplemented
    return _empty_like(x), _empty(x, (n, groups)), _empty(x, (n, groups))


@_shape_function(aten.addmm.default)
def _addmm(bias: Tensor, x: Tensor, y: Tensor, **scale: Any) -> Any:
    fits = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[0] and bias.shape == y.shape[1:]
    if not fits or not x.dtype == y.dtype == bias.dtype:
        return NotImplemented
    return _empty(x, (x.shape[0], y.shape[1]))


@_shape_function(aten.upsample_bilinear2d.default, aten.upsample_nearest2d.default)
def _upsample(x: Tensor, size: Any, *options: Any) -> Any:
    if x.dim() != 4 or len(size) != 2 or min(size) <= 0:
        return NotImplemented
    return _empty(x, [*x.shape[:2], *size])


def _empty_like(x: Tensor) -> Tensor:
    """Return what ``torch.empty_like`` does, which is slow Python on the meta device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what ``x.new_empty(shape)`` does, which takes four times as long."""
    return torch.empty(shape, dtype=x.dtype, device=_META)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, each once: not those of a slice, nor one that is expanded."""
    if x.is_contiguous():
        return True
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return extent == x.numel()


def _is_full_precision(x: Tensor) -> bool:
    """Whether ``x`` is in single or double precision; in half precision, statistics have another dtype."""
    return x.dtype in (torch.float32, torch.float64)


def _misfits(parameter: Tensor | None, shape: torch.Size) -> bool:
    """Whether a parameter is present and has another shape; then torch is called, and raises."""
    return parameter is not None and parameter.shape != shape
