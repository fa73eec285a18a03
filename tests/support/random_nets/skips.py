"""Residual blocks of which the branch keeps the shape of its input, so that it may vanish."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from tests.support.random_nets.registry import Body, Shape, block, chain, fit, flags, pick, shape_after

ADDITIONS = ["plus", "behind", "in_place", "into_branch", "add", "scaled", "minus", "gamma", "clone"]


@block(bodies=1, how=pick(ADDITIONS), act=pick(["none", "relu", "inplace"]), norm=flags, drop=flags)
class Skip(nn.Module):
    def __init__(self, shape: Shape, body: Body, how: str, act: str, norm: bool, drop: bool) -> None:
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm2d(shape[0]) if norm else nn.Identity()
        self.body = chain(body, shape)
        self.back = nn.Conv2d(shape_after(self.body, shape)[0], shape[0], 1)
        self.drop = StochasticDepth(0.2, "row") if drop else nn.Identity()
        self.gamma = nn.Parameter(torch.rand(shape[0], 1, 1) + 0.5) if how == "gamma" else None
        self.act = {"none": nn.Identity(), "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True)}[act]

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop(fit(self.back(self.body(self.norm(x.clone()))), x))
        return self.act(self.added(x, branch if self.gamma is None else self.gamma * branch))

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the sum of input and branch, or their difference."""
        if self.how == "in_place":
            y = x.clone()
            y += branch
            return y
        if self.how == "into_branch":
            branch += x
            return branch
        if self.how == "add":
            return torch.add(x, branch)
        if self.how == "scaled":
            return x.add(branch, alpha=0.5)
        if self.how == "minus":
            return x - branch
        if self.how == "clone":
            return x.clone() + branch
        return branch + x if self.how == "behind" else x + branch
