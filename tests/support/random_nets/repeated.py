"""Blocks that use the same layer or weight several times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_nets.registry import Body, Shape, block, chain, fit, pick, shape_after


@block(bodies=1, times=pick([2, 3]), norms=pick(["shared", "own", "none"]))
class Recurrent(nn.Module):
    """Apply the same body several times, with a norm of each time or with the same one."""

    def __init__(self, shape: Shape, body: Body, times: int, norms: str) -> None:
        super().__init__()
        self.times, self.body = times, chain(body, shape)
        after = shape_after(self.body, shape)[0]
        self.back = nn.Conv2d(after, shape[0], 1)
        made = [nn.BatchNorm2d(shape[0]) if norms != "none" else nn.Identity() for _ in range(times)]
        self.norms = nn.ModuleList([made[0]] * times if norms == "shared" else made)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + fit(norm(self.back(self.body(x.clone()))).tanh(), x)
        return x


@block(levels=pick([2, 3]), join=pick(["sum", "cat", "one"]), norms=pick(["shared", "own"]))
class Levels(nn.Module):
    """As heads of detectors: the same convolution on several sizes of the image."""

    def __init__(self, shape: Shape, levels: int, join: str, norms: str) -> None:
        super().__init__()
        self.conv, self.join = nn.Conv2d(shape[0], 6, 3, padding=1), join
        made = [nn.BatchNorm2d(6) for _ in range(levels)]
        self.norms = nn.ModuleList([made[0]] * levels if norms == "shared" else made)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for level, norm in enumerate(self.norms):
            scaled = F.adaptive_avg_pool2d(x, (max(x.shape[2] >> level, 1), max(x.shape[3] >> level, 1)))
            outs.append(F.interpolate(norm(self.conv(scaled)).relu(), size=x.shape[2:]))
        if self.join == "cat":
            return torch.cat(outs, 1)
        return outs[-1] if self.join == "one" else torch.stack(outs).sum(0)


TIES = ["transposed", "linear", "same", "slice", "flipped", "both_ways"]


@block(hidden=pick([3, 6]), style=pick(TIES))
class Tied(nn.Module):
    """Weights that are used twice: there and back, in part, flipped."""

    def __init__(self, shape: Shape, hidden: int, style: str) -> None:
        super().__init__()
        channels, self.style, self.keep = shape[0], style, max(hidden - 1, 1)
        self.conv, self.square = nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.linear = nn.Linear(channels, hidden)
        self.first, self.second = (nn.Conv2d(channels, hidden, 1) for _ in "ab")
        if style == "same":
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "transposed":
            return x + F.conv_transpose2d(self.conv(x).relu(), self.conv.weight, padding=1)
        if self.style == "linear":
            tokens = x.permute(0, 2, 3, 1)
            return (tokens + F.linear(self.linear(tokens).relu(), self.linear.weight.t())).permute(0, 3, 1, 2)
        if self.style == "same":
            return torch.cat([self.first(x), self.second(x.flip(3))], 1)
        if self.style == "slice":
            return F.conv2d(x, self.conv.weight[: self.keep], padding=1)
        if self.style == "flipped":
            return self.conv(x) + F.conv2d(x, self.conv.weight.flip(3), padding=1)
        return self.square(self.square(x).relu())
