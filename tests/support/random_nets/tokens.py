"""Blocks on tokens, attention, products of activations, and windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_nets.registry import (
    Body,
    Shape,
    activation,
    block,
    chain,
    divisor,
    flags,
    pick,
    shape_after,
    widths,
)


@block(
    hidden=pick([3, 6, 8]), norm=flags, act=pick(["gelu", "relu"]),
    back=pick(["shape", "free", "unflatten", "attribute"]),
)  # fmt: skip
class Mlp(nn.Module):
    def __init__(self, shape: Shape, hidden: int, norm: bool, act: str, back: str) -> None:
        super().__init__()
        self.width, self.back, self.act = shape[0], back, activation(act, hidden)
        self.norm = nn.LayerNorm(shape[0]) if norm else nn.Identity()
        self.up, self.down = nn.Linear(shape[0], hidden), nn.Linear(hidden, shape[0])

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.down(self.act(self.up(self.norm(tokens))))
        tokens = tokens.transpose(1, 2)
        if self.back == "unflatten":
            return tokens.unflatten(2, (h, w))
        return tokens.reshape(b, {"shape": c, "free": -1, "attribute": self.width}[self.back], h, w)


@block(hidden=pick([3, 5]))
class Mixer(nn.Module):
    """Linear layers over the pixels, without biases, so that a channel of zeros stays zero."""

    def __init__(self, shape: Shape, hidden: int) -> None:
        super().__init__()
        pixels = shape[1] * shape[2]
        self.up, self.down = nn.Linear(pixels, hidden, bias=False), nn.Linear(hidden, pixels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x.flatten(2)).relu()).reshape(x.shape)


ATTENTION = ["attributes", "from_input", "free", "number", "chunk", "head_major", "torch", "conv", "kv"]
PRODUCTS = ["fused", "constant", "from_shape", "from_attribute", "einsum", "unscaled"]


@block(
    heads=pick([1, 2, 3, 4]), style=pick(ATTENTION), product=pick(PRODUCTS),
    merge=pick(["free", "input", "flatten", "own"]), residual=flags,
)  # fmt: skip
class Attention(nn.Module):
    def __init__(
        self, shape: Shape, heads: int, style: str, product: str, merge: str, residual: bool
    ) -> None:
        super().__init__()
        channels = shape[0]
        self.heads, self.style, self.product, self.merge = divisor(channels, heads), style, product, merge
        self.dim, self.residual = channels // self.heads, residual
        self.scale = self.dim**-0.5
        self.qkv = (
            nn.Conv2d(channels, 3 * channels, 1) if style == "conv" else nn.Linear(channels, 3 * channels)
        )
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.torch = (
            nn.MultiheadAttention(channels, self.heads, batch_first=True) if style == "torch" else None
        )
        self.out = nn.Linear(channels, channels)

    def parts(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each (b, heads, n, d)."""
        b, n, c = x.shape
        if self.style == "attributes":
            return self.qkv(x).reshape(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.style == "from_input":
            qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]
        if self.style == "kv":
            q = self.q(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
            kv = self.kv(x).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            return q, kv[0], kv[1]
        if self.style == "conv":
            qkv = self.qkv(image).reshape(b, self.heads, -1, n).chunk(3, dim=2)
            return tuple(part.transpose(-2, -1) for part in qkv)
        if self.style == "head_major":
            return self.qkv(x).contiguous().view(b, n, self.heads, 3 * self.dim).transpose(1, 2).chunk(3, -1)
        parts = self.qkv(x).chunk(3, -1)
        if self.style == "chunk":
            return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        heads = self.heads if self.style == "free" else int(self.heads)
        return tuple(part.reshape(b, n, heads, -1).transpose(1, 2) for part in parts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.product == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.product == "einsum":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
            return torch.einsum("bhqk,bhkd->bhqd", weights.softmax(-1), v)
        scale = {"constant": self.scale, "from_shape": q.shape[-1] ** -0.5, "from_attribute": self.dim**-0.5}
        weights = q @ k.transpose(-2, -1) * scale.get(self.product, 1.0)
        return weights.softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        b, n, c = tokens.shape
        if self.torch is not None:
            y = self.torch(tokens, tokens, tokens, need_weights=self.product != "fused")[0]
        else:
            y = self.attend(*self.parts(tokens, x)).transpose(1, 2)
            if self.merge == "flatten":
                y = y.flatten(2)
            else:
                y = y.reshape(b, n, {"free": -1, "input": c, "own": self.heads * self.dim}[self.merge])
            y = self.out(y)
        y = y + tokens if self.residual else y
        return y.transpose(1, 2).reshape(b, -1, *x.shape[2:])


@block(style=pick(["einsum", "matmul", "grouped", "bmm"]), groups=pick([2, 3]), out=widths)
class Product(nn.Module):
    """Linear maps by matrix products, with a weight that belongs to no layer."""

    def __init__(self, shape: Shape, style: str, groups: int, out: int) -> None:
        super().__init__()
        self.style, self.groups = style, divisor(shape[0], groups)
        size = (self.groups, shape[0] // self.groups, 4) if style in ("grouped", "bmm") else (shape[0], out)
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "einsum":
            return torch.einsum("bchw,cd->bdhw", x, self.weight)
        if self.style == "matmul":
            return (x.permute(0, 2, 3, 1) @ self.weight).permute(0, 3, 1, 2)
        b, _, h, w = x.shape
        if self.style == "grouped":
            y = torch.einsum("bgcn,gcd->bgdn", x.reshape(b, self.groups, -1, h * w), self.weight)
            return y.reshape(b, -1, h, w)
        y = x.reshape(b, self.groups, -1, h * w).permute(1, 0, 3, 2).reshape(self.groups, b * h * w, -1)
        y = torch.bmm(y, self.weight).reshape(self.groups, b, h * w, -1)
        return y.permute(1, 0, 3, 2).reshape(b, -1, h, w)


@block(rank=pick([1, 3]))
class OtherRank(nn.Module):
    """A convolution over one or three dimensions."""

    def __init__(self, shape: Shape, rank: int) -> None:
        super().__init__()
        self.rank = rank
        flat = nn.Conv1d(shape[0], 6, 3, padding=1)
        self.conv = flat if rank == 1 else nn.Conv3d(shape[0], 6, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 1:
            return self.conv(x.flatten(2)).unflatten(-1, x.shape[2:])
        return self.conv(x.unsqueeze(2)).squeeze(2)


@block(window=pick([2, 3]), bodies=1)
class Windows(nn.Module):
    """As in Swin: the body is applied to each window as an image; the image is padded to whole windows."""

    def __init__(self, shape: Shape, body: Body, window: int) -> None:
        super().__init__()
        self.window = window
        self.body = nn.Sequential(*chain(body, (shape[0], window, window)))
        self.back = nn.Conv2d(shape_after(self.body, (shape[0], window, window))[0], shape[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.window
        b, c, h, w = x.shape
        x = F.pad(x, (0, -w % s, 0, -h % s)).permute(0, 2, 3, 1)
        high, wide = x.shape[1] // s, x.shape[2] // s
        x = x.reshape(b, high, s, wide, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s, s, c)
        y = self.back(self.body(x.permute(0, 3, 1, 2)))
        y = F.interpolate(y, size=(s, s)).permute(0, 2, 3, 1)
        y = y.reshape(b, high, wide, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, high * s, wide * s, c)
        return y[:, :h, :w].permute(0, 3, 1, 2)


@block(style=pick(["kernel", "mix"]))
class Dynamic(nn.Module):
    """Products of activations, where one takes the place of a weight."""

    def __init__(self, shape: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.query, self.value = nn.Conv2d(shape[0], 4, 1), nn.Conv2d(shape[0], 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.query(x).flatten(2), self.value(x)
        if self.style == "kernel":
            mean = v.mean((2, 3))[:, :, None, None]
            return torch.cat([v * mean, q.reshape(x.shape[0], -1, *x.shape[2:])], 1)
        context = q.softmax(-1) @ v.flatten(2).transpose(1, 2)  # (b, 4, 6)
        return (context.transpose(1, 2) @ q).reshape(x.shape[0], -1, *x.shape[2:])
