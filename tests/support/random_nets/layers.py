"""Blocks of one layer with norm and activation, and changes of the image size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DropBlock2d, StochasticDepth

from tests.support.random_nets.registry import (
    Shape,
    activation,
    activations,
    block,
    divisor,
    flags,
    norm,
    norms,
    pick,
    shape_after,
    small,
    widths,
)


@block(
    out=widths, kernel=pick([1, 3]), stride=pick([1, 1, 2]), dilation=pick([1, 1, 2]), groups=small, bias=flags,
    norm=norms, act=activations,
)  # fmt: skip
def Conv(
    shape: Shape, out: int = 8, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1,
    bias: bool = False, norm: str = "batch", act: str = "relu",
) -> nn.Module:  # fmt: skip
    """Build a convolution, a norm and an activation."""
    pad = dilation * (kernel // 2)
    groups = divisor(shape[0], groups)
    out = max(out // groups, 1) * groups
    conv = nn.Conv2d(shape[0], out, kernel, stride, pad, dilation, groups, bias=bias)
    return _with_norm(conv, shape, norm, act)


def _with_norm(layer: nn.Module, shape: Shape, kind: str, act: str) -> nn.Module:
    after = shape_after(layer, shape)
    return nn.Sequential(layer, norm(kind, after), activation(act, after[0]))


@block(times=pick([1, 1, 2, 3]), bias=flags, norm=norms, act=activations)
def Depthwise(shape: Shape, times: int, bias: bool, norm: str, act: str) -> nn.Module:
    """Build a depthwise convolution with one or more filters for each channel."""
    conv = nn.Conv2d(shape[0], shape[0] * times, 3, padding=1, groups=shape[0], bias=bias)
    return _with_norm(conv, shape, norm, act)


@block(out=widths, groups=pick([1, 1, 2, 3, 99]), stride=pick([1, 2]), bias=flags, norm=norms)
def Up(shape: Shape, out: int, groups: int, stride: int, bias: bool, norm: str) -> nn.Module:
    """Build a transposed convolution; 99 groups mean one per channel."""
    groups = divisor(shape[0], groups)
    out = shape[0] if groups == shape[0] else max(out // groups, 1) * groups
    conv = nn.ConvTranspose2d(shape[0], out, 2 if stride == 2 else 3, stride, 1, groups=groups, bias=bias)
    if min(shape[1:]) < 3:
        conv = nn.ConvTranspose2d(shape[0], out, 1, groups=groups, bias=bias)
    return _with_norm(conv, shape, norm, "relu")


@block(norm=norms, act=activations)
def Norm(shape: Shape, norm: str, act: str) -> nn.Module:
    """Build a norm and an activation."""
    if norm == "none" and act == "inplace":
        act = "relu"  # the layer before may need its own output for its gradient
    return _with_norm(nn.Identity(), shape, norm, act)


@block(kind=pick(["max", "average", "nearest", "bilinear", "adaptive"]))
class Resize(nn.Module):
    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind = kind if min(shape[1:]) > 1 else "nearest"

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return F.max_pool2d(x, 2)
        if self.kind == "average":
            return F.avg_pool2d(x, 2)
        if self.kind == "adaptive":
            return F.adaptive_avg_pool2d(x, (3, 2))
        size = (x.shape[2] + 1, x.shape[3] + 2)
        return F.interpolate(x, size=size, mode=self.kind)


@block(kind=pick(["2d", "2d", "alpha", "row", "batch", "block", "inplace"]))
def ChannelDropout(shape: Shape, kind: str) -> nn.Module:
    """Build a dropout of whole channels, images or regions."""
    kinds = {
        "2d": nn.Dropout2d(0.3), "alpha": nn.FeatureAlphaDropout(0.3), "row": StochasticDepth(0.3, "row"),
        "batch": StochasticDepth(0.3, "batch"), "block": DropBlock2d(0.1, 1),
        "inplace": nn.Sequential(nn.Conv2d(shape[0], shape[0], 1), nn.Dropout2d(0.3, inplace=True)),
    }  # fmt: skip
    return kinds[kind]
