"""What we say that operators give is what torch says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.tracing.shape_functions import SHAPES, quick

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
NORM = [meta(6) for _ in range(4)]


def cases() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for op in SHAPES:
        arguments = op._schema.arguments
        if len(arguments) == 1 or all(argument.has_default_value() for argument in arguments[1:]):
            many = op is aten.cat.default
            yield from ((op, ([x, x] if many else x,)) for x in OPERANDS)
    yield from ((op, pair) for op in SHAPES if op.overloadpacket in BINARY for pair in PAIRS)
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


BINARY = (aten.add, aten.mul, aten.sub, aten.div)


def described(value: Any) -> list[tuple[Any, ...]]:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [(part.shape, part.dtype, part.device.type) for part in parts]


def test_every_answer_is_torchs_own() -> None:
    told = set()
    for op, args in cases():
        try:
            right = op(*args)
        except (RuntimeError, IndexError, ValueError):
            right = None  # then we must not have an answer either
        mine = quick(op, args, {})
        if mine is NotImplemented:
            continue
        assert right is not None, (op, args)
        assert described(mine) == described(right), (op, args)
        told.add(op)
    assert told == set(SHAPES)


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
def test_operands_that_do_not_fit_are_left_to_torch(op: Any, args: tuple[Any, ...]) -> None:
    assert quick(op, args, {}) is NotImplemented
    with pytest.raises(RuntimeError):
        op(*args)


def test_an_operator_in_place_gives_its_operand() -> None:
    x = meta(2, 6)
    assert quick(aten.relu_.default, (x,), {}) is x
