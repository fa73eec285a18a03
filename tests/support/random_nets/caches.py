"""Blocks that keep what they computed: values of an eval forward, tables by size, cached helpers, einops."""

from __future__ import annotations

import functools
from typing import Any

import torch
from einops import einsum, pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import EinMix, Rearrange, Reduce
from torch import Tensor, nn

from tests.support.random_nets.registry import Shape, block, divisor, flags, pick

CACHES = ["scale", "bias", "table", "table_by_size", "buffer", "once"]


@block(style=pick(CACHES))
class Cached(nn.Module):
    """Keep what was computed of parameters in eval mode until training begins, or tables of sines by their size."""

    def __init__(self, shape: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.cache: dict[Any, Tensor] = {}
        self.table: Tensor | None = None
        self.log_scale = nn.Parameter(torch.rand(shape[0]))
        self.pixels = nn.Parameter(torch.rand(shape[0], 3))
        self.register_buffer("places", torch.arange(shape[1] * shape[2]) % 3, persistent=False)

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def computed(self, x: Tensor) -> Tensor:
        """Return a gate of (c, 1, 1) or (c, h, w)."""
        if self.style == "scale":
            return self.log_scale.exp()[:, None, None]
        return self.pixels[:, self.places].view(-1, *x.shape[2:])

    def sines(self, x: Tensor) -> Tensor:
        """Return a gate of (h, w) that only depends on sizes."""
        rows = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        return torch.sin(rows + torch.arange(x.shape[3], dtype=x.dtype)) + 1.5

    def forward(self, x: Tensor) -> Tensor:
        if self.style in ("scale", "bias"):
            if self.training:
                return x * self.computed(x)
            if "gate" not in self.cache:
                self.cache["gate"] = self.computed(x)
            return x * self.cache["gate"]
        if self.style == "table_by_size":
            key = (*x.shape[2:], x.dtype)
            if key not in self.cache:
                self.cache[key] = self.sines(x)
            return x * self.cache[key]
        if self.style == "buffer":
            if not hasattr(self, "sine") or self.sine.dtype != x.dtype:
                self.register_buffer("sine", self.sines(x), persistent=False)
            return x * self.sine
        if self.table is None or self.table.shape[0] != (x.shape[1] if self.style == "once" else x.shape[2]):
            self.table = self.sines(x) if self.style == "table" else torch.ones(x.shape[1], dtype=x.dtype) * 2
        return x * (self.table if self.style == "table" else self.table[:, None, None])


@functools.lru_cache
def _part(channels: int, groups: int) -> int:
    return channels // groups


@functools.cache
def _merged(*sizes: int) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


@functools.lru_cache(maxsize=4)
def _grid(high: int, wide: int) -> Tensor:
    return torch.linspace(0.5, 1.5, high * wide, dtype=torch.float64).view(high, wide)


@functools.lru_cache
def _order(channels: int, groups: int) -> tuple[int, ...]:
    return tuple(range(0, channels - channels % groups, groups))


@block(style=pick(["part", "merged", "grid", "order", "method"]), groups=pick([2, 3]))
class Helper(nn.Module):
    """Sizes and tables by helpers under ``functools.lru_cache``."""

    def __init__(self, shape: Shape, style: str, groups: int) -> None:
        super().__init__()
        self.style, self.groups = style, divisor(shape[0], groups)

    @functools.lru_cache  # noqa: B019
    def sizes(self, channels: int) -> tuple[int, int]:
        """Return groups, and channels in each."""
        return self.groups, channels // self.groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.style == "part":
            y = x.reshape(b, self.groups, _part(c, self.groups), h, w)
            return y.transpose(1, 2).reshape(b, c, h, w)
        if self.style == "method":
            return x.reshape(b, *self.sizes(c), h, w).flip(1).reshape(b, c, h, w)
        if self.style == "merged":
            return x.reshape(b, _merged(c, h, w)).reshape(b, c, _merged(h, w)).reshape(x.shape)
        if self.style == "order":
            return x[:, _order(c, self.groups)]
        return x * _grid(h, w).to(x.dtype)


EINOPS = ["shuffle", "layer", "tokens", "gate", "layers", "repeat", "depth", "heads", "mix", "pack"]


@block(style=pick(EINOPS), groups=pick([2, 3]), fused=flags)
class Einops(nn.Module):
    """Layers and functions of einops, which keep recipes by sizes."""

    def __init__(self, shape: Shape, style: str, groups: int, fused: bool) -> None:
        super().__init__()
        channels, self.style, self.groups, self.fused = shape[0], style, divisor(shape[0], groups), fused
        self.linear, self.keep = nn.Linear(channels, channels), max(channels // 2, 1)
        self.conv, self.qkv = nn.Conv2d(channels, 8, 1), nn.Linear(channels, 3 * channels)
        self.shuffle = Rearrange("b (g c) h w -> b (c g) h w", g=self.groups)
        self.to_tokens = Rearrange("b c h w -> b (h w) c")
        self.depth, self.mean = (
            Rearrange("b (c p q) h w -> b c (h p) (w q)", p=2, q=2),
            Reduce("b n c -> b c", "mean"),
        )
        self.mix = EinMix("b c h w -> b k h w", weight_shape="c k", bias_shape="k", c=channels, k=5)

    def attend(self, x: Tensor) -> Tensor:
        tokens = self.to_tokens(x)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.groups) for t in self.qkv(tokens).chunk(3, -1))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            weights = einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
            y = einsum(weights, v, "b h i j, b h j d -> b h i d")
        return rearrange(
            self.linear(rearrange(y, "b h n d -> b n (h d)")), "b (h w) c -> b c h w", h=x.shape[2]
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.style == "shuffle":
            return rearrange(x, "b (g c) h w -> b (c g) h w", g=self.groups)
        if self.style in ("layer", "depth", "mix"):
            layer = {"layer": self.shuffle, "mix": self.mix, "depth": nn.Sequential(self.conv, self.depth)}
            return layer[self.style](x)
        if self.style == "tokens":
            tokens = self.linear(rearrange(x, "b c h w -> b (h w) c"))
            return rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)
        if self.style == "gate":
            return x * reduce(x, "b c h w -> b c 1 1", "mean").sigmoid()
        if self.style == "layers":
            return x * rearrange(self.linear(self.mean(self.to_tokens(x))), "b c -> b c 1 1").sigmoid()
        if self.style == "repeat":
            return repeat(x, "b c h w -> b (r c) h w", r=2)
        if self.style == "heads":
            return self.attend(x)
        both, sizes = pack([x, self.conv(x)], "b * h w")
        first, second = unpack(both, sizes, "b * h w")
        return torch.cat([second, first], 1)
