"""Blocks in which a number of channels becomes a number, or the length of a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_nets.registry import Shape, block, divisor, pick


@functools.lru_cache
def _scale(channels: int) -> float:
    return float(channels) ** -0.5


NUMBERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tensor": lambda x, c: x / torch.tensor(c).sqrt(),
    "tensor_float": lambda x, c: x * torch.tensor(1.0 / c, dtype=x.dtype),
    "as_tensor": lambda x, c: x / torch.as_tensor([c, c]).sum(),
    "full": lambda x, c: x / torch.full((1,), c, dtype=x.dtype).sqrt(),
    "full_like": lambda x, c: x / torch.full_like(x[:1, :1], c),
    "new_tensor": lambda x, c: x / x.new_tensor(float(c)),
    "new_full": lambda x, c: x / x.new_full((1, 1, 1, 1), c),
    "arange": lambda x, c: x / torch.arange(1, c + 1).sum(),
    "arange_gate": lambda x, c: x * torch.arange(1, c + 1, dtype=x.dtype)[:, None, None],
    "linspace": lambda x, c: x * torch.linspace(0, c, 3, dtype=x.dtype).mean(),
    "linspace_gate": lambda x, c: x * torch.linspace(0.5, 1.5, c, dtype=x.dtype)[:, None, None],
    "sqrt": lambda x, c: x / math.sqrt(c),
    "power": lambda x, c: x * c**-0.5,
    "numel": lambda x, c: x / x[0, :, 0, 0].numel(),
    "ones": lambda x, c: x / torch.ones(c, dtype=x.dtype).sum(),
    "ones_like": lambda x, c: x / torch.ones_like(x).sum(1, keepdim=True),
    "alpha": lambda x, c: torch.add(x, x, alpha=1 / c),
    "clamp": lambda x, c: x.clamp(-c / 8, c / 8),
    "cached": lambda x, c: x * _scale(c),
    "len": lambda x, c: x / len(x[0]),
    "int": lambda x, c: x / float(int(c)),
    "numpy": lambda x, c: x / torch.tensor(float(np.sqrt(c))),
    "text": lambda x, c: x / torch.tensor(float(str(c))),
    "list": lambda x, c: x / torch.tensor([1.0] * c).sum(),
    "shape_numel": lambda x, c: x / float(x[0, :, 0, 0].shape.numel()),
    "branch": lambda x, c: x * 2 if c > 5 else x,
    "size_one": lambda x, c: x * (1.0 if c == 1 else 0.5),
    "layer_norm": lambda x, c: x * F.layer_norm(x.mean((2, 3)), (c,)).sigmoid()[..., None, None],
}


@block(style=pick(sorted(NUMBERS)))
class Number(nn.Module):
    """Scale channels by something that follows from their number."""

    def __init__(self, shape: Shape, style: str) -> None:
        super().__init__()
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        return NUMBERS[self.style](x, x.shape[1])


@block(style=pick(["scale", "inverse", "heads", "owner", "half"]), groups=pick([2, 3]))
class OwnNumber(nn.Module):
    """Scale channels by an attribute that also gives a size, or by a part of it."""

    def __init__(self, shape: Shape, style: str, groups: int) -> None:
        super().__init__()
        self.style, self.width, self.groups = style, shape[0], divisor(shape[0], groups)
        self.conv = nn.Conv2d(shape[0], shape[0], 1)
        self.scale = (shape[0] // self.groups) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.style == "owner":
            return y / self.conv.out_channels
        grouped = y.reshape(y.shape[0], self.groups, self.width // self.groups, *y.shape[2:])
        number = {
            "scale": self.scale, "inverse": 1 / self.width, "heads": (self.width // self.groups) ** -0.5,
            "half": self.width / 2,
        }[self.style]  # fmt: skip
        return (grouped * number).flatten(1, 2)
