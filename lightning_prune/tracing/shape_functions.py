"""What the commonest operators give, without asking torch (level 0).

On meta tensors torch answers with decompositions written in Python: right, but half a millisecond for a batch
norm, which was most of the time of a trace. These few are the same answers in microseconds; whatever is not
clearly one of them is left to torch. The tests hold each against torch's own answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["SHAPES", "quick"]

aten = torch.ops.aten
Answer = Callable[..., Any]
SHAPES: dict[OpOverload, Answer] = {}


def quick(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``operator`` on meta tensors; ``NotImplemented`` where torch has to be asked."""
    answer = SHAPES.get(operator)
    return NotImplemented if answer is None else answer(*args, **kwargs)


def _answers(*operators: OpOverload) -> Callable[[Answer], Answer]:
    def register(function: Answer) -> Answer:
        SHAPES.update(dict.fromkeys(operators, function))
        return function

    return register


@_answers(
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
)
def _like(x: Tensor, *options: Any, **named: Any) -> Any:
    return _alike(x) if x.is_floating_point() else NotImplemented


@_answers(
    aten.relu_.default,
    aten.gelu_.default,
    aten.silu_.default,
    aten.leaky_relu_.default,
    aten.hardtanh_.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
)
def _itself(x: Tensor, *options: Any, **named: Any) -> Any:
    return x if x.is_floating_point() else NotImplemented


@_answers(aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
def _both(x: Tensor, y: Any, **scale: Any) -> Any:
    if not isinstance(y, Tensor) or not x.is_floating_point() or x.dtype != y.dtype or x.dim() != y.dim():
        return NotImplemented
    if x.shape == y.shape:
        return _alike(x) if x.stride() == y.stride() else NotImplemented
    fits = x.is_contiguous() and all(b in (1, a) for a, b in zip(x.shape, y.shape, strict=True))
    return x.new_empty(x.shape) if fits else NotImplemented


@_answers(aten.cat.default)
def _cat(parts: list[Tensor], dim: int = 0) -> Any:
    first, *rest = parts
    at = dim % max(first.dim(), 1)
    others = (first.shape[:at], first.shape[at + 1 :])
    for part in rest:
        if (part.shape[:at], part.shape[at + 1 :]) != others or part.dtype != first.dtype:
            return NotImplemented
    if not first.dim() or not all(part.is_contiguous() for part in parts):
        return NotImplemented
    return first.new_empty([*others[0], sum(part.shape[at] for part in parts), *others[1]])


@_answers(aten.native_batch_norm.default)
def _batch_norm(x: Tensor, *rest: Any) -> Any:
    *parameters, _, _, _ = rest
    if not _single(x) or x.dim() < 2 or any(_other(each, x.shape[1:2]) for each in parameters):
        return NotImplemented
    return _alike(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


@_answers(aten.native_layer_norm.default)
def _layer_norm(x: Tensor, shape: Any, *rest: Any) -> Any:
    before = x.dim() - len(shape)
    if not _single(x) or any(_other(each, x.shape[before:]) for each in (*rest[:2], torch.Size(shape))):
        return NotImplemented
    saved = [*x.shape[:before], *([1] * len(shape))]
    return x.new_empty(x.shape), x.new_empty(saved), x.new_empty(saved)


@_answers(aten.native_group_norm.default)
def _group_norm(
    x: Tensor, weight: Any, bias: Any, n: int, c: int, positions: int, groups: int, eps: float
) -> Any:
    fits = _single(x) and x.is_contiguous() and c % groups == 0 and [n, c] == list(x.shape[:2])
    if (
        not fits
        or n * c * positions != x.numel()
        or any(_other(each, x.shape[1:2]) for each in (weight, bias))
    ):
        return NotImplemented
    return _alike(x), x.new_empty(n, groups), x.new_empty(n, groups)


@_answers(aten.addmm.default)
def _addmm(bias: Tensor, x: Tensor, y: Tensor, **scale: Any) -> Any:
    fits = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[0] and bias.shape == y.shape[1:]
    return (
        x.new_empty(x.shape[0], y.shape[1]) if fits and x.dtype == y.dtype == bias.dtype else NotImplemented
    )


@_answers(aten.upsample_bilinear2d.default, aten.upsample_nearest2d.default)
def _upsample(x: Tensor, size: Any, *options: Any) -> Any:
    return (
        x.new_empty([*x.shape[:2], *size])
        if x.dim() == 4 and len(size) == 2 and min(size) > 0
        else NotImplemented
    )


def _alike(x: Tensor) -> Tensor:
    """``torch.empty_like``, which is Python on the meta device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _single(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)  # half precision mixes kinds of numbers


def _other(given: Tensor | torch.Size | None, wanted: torch.Size) -> bool:
    """Whether a parameter is there and does not fit; then torch is asked, and raises."""
    return given is not None and (given.shape if isinstance(given, Tensor) else given) != wanted
