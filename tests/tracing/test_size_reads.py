"""Which dimensions the code of a network uses of the shapes that it reads, and which attributes it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.tracing.hidden_code import hides_reads
from lightning_prune.tracing.recorder import record_forward
from lightning_prune.tracing.size_reads import SizeReads


class Reads(nn.Module):
    """Calls a function with the result of a convolution."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.function(y)
        return y


def reads(function: Callable[[Tensor], Any]) -> SizeReads:
    return record_forward(Reads(function), (torch.zeros(2, 3, 5, 6),), {}, False).reads


def unpacked(x: Tensor) -> int:
    n, c, h, w = x.shape  # noqa: RUF059
    return n * h


def with_one_name_twice(x: Tensor) -> int:
    _, _, h, w = x.shape
    return h * w


def with_channels(x: Tensor) -> int:
    n, c, *_ = x.size()
    return n + c


def in_closure(x: Tensor) -> Any:
    n, c, h, w = x.shape  # noqa: RUF059
    return lambda: c


def kept(x: Tensor) -> Any:
    shape = x.shape
    return shape[2:]


CASES: dict[str, tuple[Callable[[Tensor], Any], list[tuple[int, ...]]]] = {
    "index": (lambda x: x.shape[0], [(0,)]),
    "last": (lambda x: x.shape[-1], [(3,)]),
    "slice": (lambda x: x.shape[2:], [(2, 3)]),
    "end": (lambda x: x.shape[-2:], [(2, 3)]),
    "of size": (lambda x: x.size()[:1], [(0,)]),
    "dimension": (lambda x: x.size(-3), [(1,)]),
    "by name": (lambda x: x.size(dim=0), [(0,)]),
    "unpacked": (unpacked, [(0, 2)]),
    "one name twice": (with_one_name_twice, [(2, 3)]),
    "with channels": (with_channels, [(0, 1, 2, 3)]),
    "in closure": (in_closure, [(0, 1, 2, 3)]),
    "whole": (lambda x: list(x.shape), [(0, 1, 2, 3)]),
    "kept": (kept, [(0, 1, 2, 3)]),
    "length": (lambda x: len(x), [(0,)]),
    "count": (lambda x: x.numel(), [(0, 1, 2, 3)]),
    "strides": (lambda x: x.stride(), [(0, 1, 2, 3)]),
    "bytes": (lambda x: x.nbytes, [(0, 1, 2, 3)]),
    "pooled": (lambda x: F.adaptive_avg_pool2d(x, 1), [(2, 3)]),
    "group norm": (lambda x: F.group_norm(x, 2), [(0,), (0, 2, 3)]),
    "instance norm": (lambda x: F.instance_norm(x), [(0, 2, 3)]),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), [(0, 2, 3)]),
    "compared with 0": (lambda x: x.shape[1] == 0 or x.size()[1] == 0, []),
    "compared with 1": (lambda x: x.shape[1] == 1 or x.size(1) == 1, [(1,), (1,)]),
    "compared later": (lambda x: (x.shape[1] + 0) == 0, [(1,)]),
    "no sizes": (
        lambda x: (x.dim(), x.dtype, x.device, x.is_contiguous(), x + 1, x.split(1), x.requires_grad),
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dimensions_are_those_that_the_code_uses(case: str):
    function, expected = CASES[case]
    assert [dims for _, dims in reads(function).dims] == expected


@pytest.mark.parametrize(
    "ask", [lambda x: x.shape[1] == 0, lambda x: x.size(-3) > 0, lambda x: x.size()[1] != 0]
)
def test_code_that_asks_whether_a_dimension_is_empty_uses_no_size(ask: Callable[[Tensor], Any]):
    found = reads(ask)
    assert [dim for _, dim in found.emptiness] == [1]
    assert not found.dims


def test_attributes_that_layers_pass_on_are_no_reads():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert not record_forward(net, (torch.zeros(1, 4, 3, 3),), {}, False).reads.attributes


@pytest.mark.parametrize(
    "read",
    [lambda m: m.out_channels, lambda m: getattr(m, "in_" + "channels"), repr, lambda m: m.extra_repr()],
)
def test_attributes_that_code_reads_are_noted(read: Callable[[nn.Module], Any]):
    net = Reads(lambda x: read(net.conv))
    found = record_forward(net, (torch.zeros(2, 3, 5, 6),), {}, False).reads.attributes
    assert {owner for owner, _ in found} == {id(net.conv)}
    assert net.conv.out_channels == 4
    assert "out_channels" not in vars(nn.Module)


class Fixed(nn.Conv2d):
    """Has a class attribute in the place of one of its own."""

    num_features = 7

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_features == 7
        assert not hasattr(self, "num_groups")
        self.out_features = 5
        assert self.out_features == vars(self)["out_features"] == 5
        del self.out_features
        return super().forward(x)


def test_attributes_behave_as_ever():
    assert not record_forward(Fixed(3, 4, 1), (torch.zeros(2, 3, 5, 6),), {}, False).real


def test_code_that_looks_into_dictionaries_is_found():
    assert hides_reads(Fixed(3, 4, 1))  # this file has ``vars`` above
    assert not hides_reads(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
