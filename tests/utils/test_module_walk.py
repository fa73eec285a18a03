"""The lists of modules and tensors are those of torch, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from lightning_prune.utils import module_walk as walk


class Shared(nn.Module):
    """Has a module, a parameter and a buffer twice, a missing module, and tensors at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.again, self.nothing = self.first, None
        self.register_module("empty", None)
        self.top, self.tied = nn.Parameter(torch.zeros(1)), self.first[0].weight
        self.register_buffer("mean", self.first[1].running_mean)


class Renamed(nn.Linear):
    """Yields its modules under another name."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        yield "renamed", self


def same(left: Any, right: Any) -> bool:
    pairs = list(zip(left, right, strict=True))
    return bool(pairs) and all(a == b and x is y for (a, x), (b, y) in pairs)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modules_parameters_and_buffers_are_those_of_torch():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    renamed = nn.Sequential(Renamed(1, 1), nn.BatchNorm1d(1))
    for net in (Shared(), torchvision.models.densenet121(), renamed, nn.Sequential(scripted, nn.ReLU())):
        assert same(walk.named_modules(net), net.named_modules())
        assert [*map(id, walk.modules_of(net))] == [*map(id, net.modules())]
        assert same(walk.named_parameters(net), net.named_parameters())
        assert same(walk.named_buffers(net), net.named_buffers())
        assert [*map(id, walk.tensors_of(net))] == [*map(id, (*net.parameters(), *net.buffers()))]


def test_modules_are_looked_for_once_within_a_block_unless_train_may_change_them():
    class Swaps(nn.Sequential):
        """Has another module in train mode."""

        def train(self, mode: bool = True) -> Swaps:
            self[0] = nn.ReLU() if mode else nn.Identity()
            return super().train(mode)

    net, swaps = nn.Sequential(nn.Linear(1, 1)), Swaps(nn.ReLU())
    with walk.walked_once(net), walk.walked_once(swaps), walk.walked_once(net):
        assert walk.named_modules(net) is walk.named_modules(net)
        assert type(walk.modules_of(swaps.eval())[1]) is nn.Identity
    net.append(nn.ReLU())
    assert same(walk.named_modules(net), net.named_modules())
