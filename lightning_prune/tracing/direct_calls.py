"""The operator of common Python-level calls on meta tensors, without torch's dispatcher.

``torch.conv2d(x, w, ...)`` ends in ``aten.convolution`` with arguments that are known beforehand. The way there, from
Python through the dispatcher back to Python, takes most of the time of a recording. For the calls here the operator
and its arguments are written down, and its result is that of :mod:`~lightning_prune.tracing.shape_functions`. What is
not clearly covered is ``None``, and torch is called. The tests compare recordings with and without these calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._ops import OpOverload
from torch.autograd import forward_ad

__all__ = ["DIRECT", "is_undisturbed"]

aten = torch.ops.aten
#: An operator and its positional arguments, as the dispatcher passes them to a mode.
DirectCall = tuple[OpOverload, tuple[Any, ...]]
DIRECT: dict[Any, Callable[..., DirectCall | None]] = {}
_PLAIN = (Tensor, nn.Parameter)


def is_undisturbed() -> bool:
    """Whether nothing but the modes of a recording is between a Python-level call and its operator.

    It must be called within ``__torch_function__``, where torch has taken the function mode off its stack.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 1
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_any_autocast_enabled()
        and not torch.is_grad_enabled()
        and _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0  # tangents of forward-mode derivatives would be lost
    )


def _direct(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that returns the operator and the arguments of ``functions``; None: not covered."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        DIRECT.update(dict.fromkeys(functions, function))
        return function

    return register


def _are_plain(*tensors: Any) -> bool:
    """Whether all are tensors of torch itself, on any device; the first is on the meta device."""
    return all(type(tensor) in _PLAIN for tensor in tensors) and tensors[0].is_meta


def _ints(value: Any, count: int) -> list[int] | None:
    """Return ``count`` sizes as plain ints; None if ``value`` is something else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [int.__int__(value)] * count
    if type(value) not in (tuple, list) or len(value) != count or not all(isinstance(n, int) for n in value):
        return None
    return [int.__int__(n) for n in value]


@_direct(torch.conv2d)
def _conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> DirectCall | None:
    if not _are_plain(x, weight, *(() if bias is None else (bias,))) or x.dim() != 4 or weight.dim() != 4:
        return None
    steps, pads, gaps = _ints(stride, 2), _ints(padding, 2), _ints(dilation, 2)
    if steps is None or pads is None or gaps is None or not isinstance(groups, int) or min(*steps, *gaps) < 1:
        return None
    if min(pads) < 0:
        return None
    args = (x, weight, bias, steps, pads, gaps, False, [0, 0], int.__int__(groups))
    return aten.convolution.default, args


@_direct(torch.batch_norm)
def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any, cudnn: Any
) -> DirectCall | None:
    if not _are_plain(x, *(t for t in (weight, bias, mean, var) if t is not None)):
        return None
    if type(training) is not bool or type(momentum) is not float or type(eps) is not float:
        return None
    if not training and (mean is None or var is None):
        return None
    return aten.native_batch_norm.default, (x, weight, bias, mean, var, training, momentum, eps)


def _unary(op: OpOverload) -> Callable[..., DirectCall | None]:
    def call(x: Any, *options: Any, **kwargs: Any) -> DirectCall | None:
        return (op, (x,)) if not options and not kwargs and _are_plain(x) else None

    return call


_UNARY: dict[OpOverload, tuple[Any, ...]] = {
    aten.relu.default: (torch.relu, Tensor.relu),
    aten.relu_.default: (torch.relu_, Tensor.relu_),
    aten.silu.default: (torch._C._nn.silu,),
    aten.silu_.default: (torch._C._nn.silu_,),
    aten.hardswish.default: (torch._C._nn.hardswish,),
    aten.hardswish_.default: (torch._C._nn.hardswish_,),
    aten.hardsigmoid.default: (torch._C._nn.hardsigmoid,),
    aten.hardsigmoid_.default: (torch._C._nn.hardsigmoid_,),
    aten.sigmoid.default: (torch.sigmoid, Tensor.sigmoid),
    aten.tanh.default: (torch.tanh, Tensor.tanh),
}
for _op, _functions in _UNARY.items():
    _direct(*_functions)(_unary(_op))


def _clamped(op: OpOverload) -> Callable[..., DirectCall | None]:
    def call(x: Any, *limits: Any) -> DirectCall | None:
        floats = len(limits) == 2 and all(type(limit) is float for limit in limits)
        return (op, (x, *limits)) if floats and _are_plain(x) else None

    return call


_direct(torch._C._nn.hardtanh)(_clamped(aten.hardtanh.default))
_direct(torch._C._nn.hardtanh_)(_clamped(aten.hardtanh_.default))


def _binary(op: OpOverload) -> Callable[..., DirectCall | None]:
    def call(x: Any, y: Any, **kwargs: Any) -> DirectCall | None:
        return (op, (x, y)) if not kwargs and _are_plain(x, y) and y.is_meta else None

    return call


_BINARY: dict[OpOverload, tuple[Any, ...]] = {
    aten.add.Tensor: (torch.add, Tensor.add),
    aten.mul.Tensor: (torch.mul, Tensor.mul),
    aten.add_.Tensor: (Tensor.add_,),
}
for _op, _functions in _BINARY.items():
    _direct(*_functions)(_binary(_op))


@_direct(torch.layer_norm)
def _layer_norm(
    x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn: Any = True
) -> DirectCall | None:
    if not _are_plain(x, *(t for t in (weight, bias) if t is not None)) or type(eps) is not float:
        return None
    sizes = _ints(shape, len(shape)) if type(shape) in (tuple, list) else None
    return None if not sizes else (aten.native_layer_norm.default, (x, sizes, weight, bias, eps))


@_direct(torch.group_norm)
def _group_norm(
    x: Any, groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn: Any = True
) -> DirectCall | None:
    if (
        not _are_plain(x, *(t for t in (weight, bias) if t is not None))
        or type(eps) is not float
        or x.dim() < 2
    ):
        return None
    if not isinstance(groups, int) or min(x.shape) < 1 or not x.is_contiguous():
        return None
    n, c, *sizes = x.shape
    numbers = (n, c, math.prod(sizes), int.__int__(groups))
    return aten.native_group_norm.default, (x, weight, bias, *numbers, eps)


@_direct(torch._C._nn.gelu)
def _gelu(x: Any, **kwargs: Any) -> DirectCall | None:
    plain = kwargs in ({}, {"approximate": "none"}) and _are_plain(x)
    return (aten.gelu.default, (x,)) if plain else None


@_direct(torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(x: Any, size: Any) -> DirectCall | None:
    plain = _are_plain(x) and x.dim() == 4 and _ints(size, 2) == [1, 1]
    return (aten.mean.dim, (x, [-1, -2], True)) if plain else None
