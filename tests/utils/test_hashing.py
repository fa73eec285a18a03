"""Tests of digests: every value counts, and whatever a state_dict may hold has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from lightning_prune.utils.hashing import value_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_a_tensor_counts(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    digests = {value_digest(tensor), value_digest(tensor.T.contiguous()), value_digest(tensor[:, :1])}
    assert len(digests) == 2
    assert value_digest(tensor) == value_digest(tensor.T)
    assert value_digest(tensor) != value_digest(tensor.flip(0))
    assert value_digest(tensor) != value_digest(tensor.to(torch.complex128))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([1], [True]),
        ([1], [1.0]),
        ([], {}),
        (["1"], [1]),
        ({"a": None}, {"a": 0}),
        ([[1], 2], [[1, 2]]),
        (b"a", "a"),
    ],
    ids=str,
)
def test_values_of_other_kinds_differ(left: Any, right: Any) -> None:
    assert value_digest(left) != value_digest(right)


def test_tensors_without_plain_values_have_a_digest() -> None:
    inner = torch.ones(2)
    odd = [
        TwoTensor(inner, inner),
        inner.to_sparse(),
        inner.to("meta"),
        inner.expand(3, 2),
        inner.to_mkldnn(),
        {1, 2},
    ]
    assert len({value_digest(each) for each in odd}) == len(odd)
    assert value_digest(torch.zeros(1).expand(9)) != value_digest(torch.ones(1).expand(9))
    assert value_digest(torch.zeros(1).expand(10**12)) == value_digest(torch.ones(1).expand(10**12))
