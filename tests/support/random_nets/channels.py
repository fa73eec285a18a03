"""Blocks that move channels, and parameters and buffers that belong to no layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_nets.registry import Shape, block, divisor, pick


@block(
    groups=pick([2, 3, 4]), style=pick(["attribute", "number", "free", "builtin", "unflatten", "rearrange"])
)
class Shuffle(nn.Module):
    def __init__(self, shape: Shape, groups: int, style: str) -> None:
        super().__init__()
        self.groups, self.style = divisor(shape[0], groups), style

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.style == "builtin":
            return F.channel_shuffle(x, self.groups)
        if self.style == "attribute":
            return x.reshape(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        if self.style == "free":
            return x.reshape(b, self.groups, -1, h, w).transpose(1, 2).reshape(b, -1, h, w)
        if self.style == "unflatten":
            return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        if self.style == "rearrange":
            x = x.reshape(b, c // self.groups, self.groups, h, w)
            return x.permute(0, 2, 1, 3, 4).contiguous().view(b, -1, h, w)
        groups = int(self.groups)
        return x.reshape(b, groups, int(c) // groups, h, w).transpose(1, 2).reshape(b, int(c), h, w)


@block(kind=pick(["shuffle", "unshuffle", "depth_to_space", "unfold", "unfold_sum", "window"]))
class Pixels(nn.Module):
    """Rearrangements of channels to pixels and back."""

    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind, self.r = kind, 2
        width = 4 * -(-shape[0] // 4) if kind in ("shuffle", "depth_to_space") else min(shape[0], 4)
        self.adjust = nn.Conv2d(shape[0], width, 1)
        self.conv = nn.Conv1d(width * 9, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.adjust(x)
        b, c, h, w = x.shape
        if self.kind == "shuffle":
            return F.pixel_shuffle(x, 2)
        if self.kind == "depth_to_space":
            x = x.reshape(b, c // self.r**2, self.r, self.r, h, w).permute(0, 1, 4, 2, 5, 3)
            return x.reshape(b, c // self.r**2, h * self.r, w * self.r)
        if self.kind == "unfold":
            return self.conv(F.unfold(x, 3, padding=1)).reshape(b, -1, h, w)
        if self.kind == "unfold_sum":
            return F.unfold(x, 3, padding=1).reshape(b, c, 9, h, w).sum(2)
        if h % 2 or w % 2:
            return x
        if self.kind == "window":
            return (
                x.reshape(b, c, h // 2, 2, w // 2, 2)
                .permute(0, 1, 3, 5, 2, 4)
                .reshape(b, c * 4, h // 2, w // 2)
            )
        return F.pixel_unshuffle(x, 2)


MOVES = [
    "flip", "roll", "every_second", "from_one", "without_last", "repeat", "repeat_interleave", "index", "pad",
    "keep", "own_shape", "movedim", "swap_halves", "expand_new", "tile", "first",
]  # fmt: skip


@block(how=pick(MOVES))
class Move(nn.Module):
    order: Tensor

    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how, self.keep = how if shape[0] > 2 else "flip", max(shape[0] - 2, 1)
        self.register_buffer("order", torch.arange(shape[0] - 1, -1, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        moved = {
            "flip": lambda: x.flip(1),
            "roll": lambda: torch.roll(x, 1, 1),
            "every_second": lambda: x[:, ::2],
            "from_one": lambda: x[:, 1:],
            "without_last": lambda: x[:, :-1],
            "repeat": lambda: x.repeat(1, 2, 1, 1),
            "tile": lambda: x.tile(1, 2, 1, 1),
            "repeat_interleave": lambda: x.repeat_interleave(2, 1),
            "index": lambda: x[:, self.order],
            "pad": lambda: F.pad(x, (0, 0, 0, 0, 1, 2)),
            "keep": lambda: x[:, : self.keep],
            "own_shape": lambda: x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]).reshape(x.shape),
            "movedim": lambda: x.movedim(1, -1).transpose(1, 2).permute(0, 3, 2, 1),
            "swap_halves": lambda: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
            "expand_new": lambda: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
            "first": lambda: x * x[:, :1].tanh(),
        }
        return moved[self.how]()


@block(style=pick(["scale", "view", "shift", "buffer", "channels_last", "tokens", "pixel"]))
class Loose(nn.Module):
    """Parameters and buffers that belong to no layer."""

    mask: Tensor

    def __init__(self, shape: Shape, style: str) -> None:
        super().__init__()
        self.style, channels = style, shape[0]
        sizes = {
            "shift": (channels, 1, 1), "channels_last": (1, 1, channels),
            "tokens": (1, shape[1] * shape[2], channels), "pixel": (1, 1, *shape[1:]),
        }  # fmt: skip
        self.scale = nn.Parameter(torch.rand(sizes.get(style, (channels,))) + 0.5)
        self.register_buffer("mask", torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "scale":
            return x * self.scale[:, None, None]
        if self.style == "view":
            return x * self.scale.view(1, -1, 1, 1)
        if self.style in ("shift", "pixel"):
            return x + self.scale if self.style == "shift" else x * self.scale
        if self.style == "buffer":
            return x * self.mask
        if self.style == "channels_last":
            return (x.permute(0, 2, 3, 1) * self.scale).permute(0, 3, 1, 2)
        tokens = x.flatten(2).transpose(1, 2) + self.scale
        return tokens.transpose(1, 2).reshape(x.shape)
