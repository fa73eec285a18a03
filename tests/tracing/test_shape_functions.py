"""Shape functions return what torch returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.tracing.shape_functions import SHAPE_FUNCTIONS, infer

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


LAST = meta(2, 6, 5, 4).to(memory_format=torch.channels_last)
OPERANDS = [
    meta(2, 6, 5, 4),
    LAST,
    meta(3, 8),
    meta(2, 6, 1, 4),
    meta(7),
    meta(2, 6, 5, 4, dtype=torch.int64),
]
PAIRS = [(x, y) for x in OPERANDS for y in [*OPERANDS, meta(2, 1, 5, 4), meta(3, 1), 2.5]]
BINARY = (aten.add, aten.mul, aten.sub, aten.div, aten.add_, aten.mul_)
NORM = [meta(6) for _ in range(4)]


def cases() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield operators with arguments, some of which do not fit."""
    for op in SHAPE_FUNCTIONS:
        arguments = op._schema.arguments
        if len(arguments) == 1 or all(argument.has_default_value() for argument in arguments[1:]):
            takes_list = op is aten.cat.default
            yield from ((op, ([x, x] if takes_list else x,)) for x in OPERANDS)
    yield from ((op, pair) for op in SHAPE_FUNCTIONS if op.overloadpacket in BINARY for pair in PAIRS)
    for x in OPERANDS[:2]:
        yield from (
            (aten.native_batch_norm.default, (x, *NORM, training, 0.1, 1e-5)) for training in (True, False)
        )
        yield aten.native_batch_norm.default, (x, None, None, *NORM[:2], False, 0.1, 1e-5)
        yield from ((aten.upsample_bilinear2d.default, (x, [9, 7], corners)) for corners in (True, False))
        yield aten.upsample_nearest2d.default, (x, [10, 8])
        yield from ((aten.cat.default, ([x, y], dim)) for y in OPERANDS[:4] for dim in (1, -1))
    yield aten.native_layer_norm.default, (meta(3, 5, 6), [6], *NORM[:2], 1e-5)
    yield aten.native_layer_norm.default, (meta(3, 5, 6), [5, 6], None, None, 1e-5)
    yield aten.native_group_norm.default, (meta(2, 6, 5, 4), *NORM[:2], 2, 6, 20, 3, 1e-5)
    yield aten.native_group_norm.default, (meta(2, 6, 5, 4), None, None, 2, 6, 20, 1, 1e-5)
    yield aten.addmm.default, (meta(4), meta(3, 6), meta(6, 4))
    yield (
        aten.convolution.default,
        (meta(2, 6, 5, 4), meta(4, 3, 3, 2), meta(4), [2, 1], [1, 0], [1, 2], False, [0, 0], 2),
    )
    yield aten.mean.dim, (meta(2, 6, 5, 4), [2, -1], True)


def describe(value: Any) -> list[tuple[Any, ...]]:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [(part.shape, part.dtype, part.device.type) for part in parts]


def test_shape_functions_agree_with_torch() -> None:
    covered = set()
    for op, args in cases():
        try:
            expected = op(*args)
        except (RuntimeError, IndexError, ValueError):
            expected = None  # then the shape function must not return a result either
        actual = infer(op, args, {})
        if actual is NotImplemented:
            continue
        assert expected is not None, (op, args)
        assert describe(actual) == describe(expected), (op, args)
        covered.add(op)
    assert covered == set(SHAPE_FUNCTIONS)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.native_batch_norm.default, (meta(2, 5, 4, 4), *NORM, True, 0.1, 1e-5)),
        (aten.native_layer_norm.default, (meta(3, 5), [6], None, None, 1e-5)),
        (aten.addmm.default, (meta(5), meta(3, 6), meta(6, 4))),
        (aten.cat.default, ([meta(2, 3, 4), meta(2, 3, 5)], 1)),
        (aten.add.Tensor, (meta(2, 3), meta(2, 4))),
    ],
)
def test_operands_that_do_not_fit_are_passed_to_torch(op: Any, args: tuple[Any, ...]) -> None:
    assert infer(op, args, {}) is NotImplemented
    with pytest.raises(RuntimeError):
        op(*args)


def test_an_inplace_operator_returns_its_operand() -> None:
    x = meta(2, 6)
    assert infer(aten.relu_.default, (x,), {}) is x


def with_strides(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.device.type


def compare(op: Any, *args: Any) -> bool:
    """Return whether a shape function gives a result, which must be torch's with its strides."""
    actual = infer(op, args, {})
    try:
        expected = op(*args)
    except (RuntimeError, IndexError, ValueError):
        assert actual is NotImplemented, (op, args)
        return False
    assert actual is NotImplemented or with_strides(actual) == with_strides(expected), (op, args)
    return actual is not NotImplemented


def test_convolutions_have_the_shapes_and_strides_of_torch() -> None:
    shapes = [(2, 6, 9, 8), (1, 6, 1, 1), (6, 9, 8), (2, 6, 11), (2, 6, 5, 6, 7), (2, 4, 9, 8)]
    last = meta(2, 6, 9, 8).to(memory_format=torch.channels_last)
    inputs = [*(meta(*shape) for shape in shapes), last, meta(2, 6, 9, 8, dtype=torch.float16)]
    kernels = [(4, 6, 1, 1), (6, 1, 3, 3), (4, 3, 2, 3), (4, 6, 3), (4, 2, 1, 3, 2), (5, 3, 1, 1)]
    weights = [meta(*shape) for shape in kernels]
    inferred = [
        compare(aten.convolution.default, x, w, bias, [s] * r, [p] * r, [d] * r, transposed, [0] * r, groups)
        for x in inputs
        for w in weights
        for r in [w.dim() - 2]
        for bias in (None, meta(w.shape[0]), meta(7))
        for s, p, d in ((1, 0, 1), (2, 1, 1), (3, 2, 2))
        for groups in (1, 2, 3, 6)
        for transposed in (False, True)
    ]
    assert sum(inferred) > 30


def test_means_and_products_have_the_shapes_and_strides_of_torch() -> None:
    tensors = [
        *OPERANDS,
        meta(6, 1, 1),
        meta(1),
        meta(4),
        torch.empty((), device="meta"),
        meta(5, 2, 4, 6).permute(1, 3, 0, 2),
    ]
    tensors += [meta(2, 6, 1, 1), meta(1, 1, 1, 1), meta(2, 6, 1, 1).expand(2, 6, 5, 4), meta(0, 6, 5, 4)]
    means = [
        compare(aten.mean.dim, x, dims, keepdim)
        for x in tensors
        for dims in ([2, 3], [-1], [1], [-1, -2], [0, 1, 2, 3], [3, -1], [5], [])
        for keepdim in (False, True)
    ]
    products = [
        compare(op, x, y) for op in (aten.mul.Tensor, aten.add.Tensor) for x in tensors for y in tensors
    ]
    gates = [
        compare(op, x)
        for op in (aten.sigmoid.default, aten.tanh.default)
        for x in tensors
        if x.is_contiguous()
    ]
    assert min(map(sum, (means, products, gates))) > 15
