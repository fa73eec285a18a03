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
BINARY = (aten.add, aten.mul, aten.sub, aten.div)
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
