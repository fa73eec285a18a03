"""Blocks that multiply channels by gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_nets.registry import Shape, block, pick, small


@block(ratio=small, style=pick(["conv", "linear", "expand", "one"]))
class SqueezeExcite(nn.Module):
    def __init__(self, shape: Shape, ratio: int, style: str) -> None:
        super().__init__()
        channels, self.style = shape[0], style
        hidden = max(channels // ratio, 1)
        layer = nn.Linear if style == "linear" else lambda a, b: nn.Conv2d(a, b, 1)
        self.reduce, self.widen = layer(channels, hidden), layer(hidden, 1 if style == "one" else channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "linear":
            b, c, _, _ = x.size()
            gate = self.widen(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1).view(b, c))))
            return x * torch.sigmoid(gate).reshape(b, c, 1, 1)
        if self.style == "one":
            return x * torch.sigmoid(self.widen(F.silu(self.reduce(x))))
        gate = torch.sigmoid(self.widen(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return gate.expand_as(x) * x if self.style == "expand" else x.clone().mul_(gate)


@block(style=pick(["self", "chunk", "glu", "split", "view"]))
class Gate(nn.Module):
    def __init__(self, shape: Shape, style: str) -> None:
        super().__init__()
        self.style, self.width = style, shape[0]
        self.conv = nn.Conv2d(shape[0], shape[0] * (1 if style == "self" else 2), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.style == "self":
            return x * y.sigmoid()
        if self.style == "glu":
            return F.glu(y, 1)
        if self.style == "view":
            y = y.reshape(y.shape[0], 2, -1, *y.shape[2:])
            return y[:, 0] * y[:, 1].sigmoid()
        value, gate = y.chunk(2, 1) if self.style == "chunk" else torch.split(y, self.width, dim=1)
        return value * gate.sigmoid()


@block(radix=pick([2, 3]), style=pick(["stack", "view"]))
class SelectiveKernel(nn.Module):
    """Convolutions that are weighted by a softmax or sigmoid over the branches."""

    def __init__(self, shape: Shape, radix: int, style: str) -> None:
        super().__init__()
        channels, self.radix, self.style = shape[0], radix, style
        convs = [nn.Conv2d(channels, channels, 1 + 2 * (i % 2), padding=i % 2) for i in range(radix)]
        self.branches = nn.ModuleList(convs)
        self.reduce, self.widen = nn.Linear(channels, 4), nn.Linear(4, channels * radix)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([branch(x) for branch in self.branches], 1)
        weights = self.widen(F.relu(self.reduce(stacked.sum(1).mean((2, 3)))))
        if self.style == "stack":
            parts = [p.sigmoid() for p in weights.chunk(self.radix, 1)]
            return sum(s * p[..., None, None] for s, p in zip(stacked.unbind(1), parts, strict=True))
        weights = weights.reshape(x.shape[0], self.radix, -1).softmax(1)
        return (stacked * weights[..., None, None]).sum(1)


@block(how=pick(["sum", "mean", "max"]))
class ChannelSum(nn.Module):
    """A gate of one channel that is computed from all channels, as in CBAM."""

    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        summary = x.amax(1, keepdim=True) if self.how == "max" else getattr(x, self.how)(1, keepdim=True)
        return x * self.conv(summary).sigmoid()
