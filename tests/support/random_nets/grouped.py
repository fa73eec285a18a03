"""Grouped queries: several heads of queries read the same head of keys and values."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_nets.registry import Shape, block, flags, pick

REPEATS = ["expand", "repeat_interleave", "repeat", "stack", "fused", "split", "expand_free", "index"]


@functools.lru_cache(maxsize=8)
def _angles(length: int, width: int) -> Tensor:
    rates = 0.5 ** torch.arange(width // 2, dtype=torch.float64)
    return torch.arange(length, dtype=torch.float64)[:, None] * torch.cat([rates, rates])


def rotated(x: Tensor) -> Tensor:
    """Return (b, heads, n, d) with a rotary position embedding."""
    angles = _angles(x.shape[2], x.shape[3]).to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


@block(style=pick(REPEATS), kv=pick([1, 2, 4]), times=pick([1, 2, 3]), rotary=flags, joint=flags)
class GroupedQueries(nn.Module):
    """Attention of ``kv * times`` heads of queries to ``kv`` heads of keys and values."""

    def __init__(self, shape: Shape, style: str, kv: int, times: int, rotary: bool, joint: bool) -> None:
        super().__init__()
        self.style, self.times, self.rotary, self.joint, self.head_dim = style, times, rotary, joint, 2
        heads = kv * times
        self.q, self.out = nn.Linear(shape[0], 2 * heads), nn.Linear(2 * heads, shape[0])
        self.k, self.v = nn.Linear(shape[0], 2 * kv), nn.Linear(shape[0], 2 * kv)
        self.kv = nn.Linear(shape[0], 4 * kv)

    @property
    def averages_values(self) -> bool:
        """Whether heads of queries share the only head of keys: zero queries then still average the values."""
        heads = self.kv.out_features // 4 if self.joint else self.k.out_features // 2
        return heads == 1 and self.q.out_features > 2

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, n, d = x.shape
        times = self.times
        if self.style == "expand":
            return x[:, :, None].expand(b, heads, times, n, d).reshape(b, heads * times, n, d)
        if self.style == "expand_free":
            return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
        if self.style == "repeat":
            return x.unsqueeze(2).repeat(1, 1, times, 1, 1).view(b, heads * times, n, d)
        if self.style == "stack":
            return torch.stack([x] * times, 2).flatten(1, 2)
        if self.style == "index":
            return x[:, torch.arange(heads).repeat_interleave(times)]
        return x.repeat_interleave(times, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.style == "fused":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if self.style == "split":
            grouped = q.reshape(q.shape[0], k.shape[1], self.times, *q.shape[2:])
            weights = (grouped @ k[:, :, None].transpose(-1, -2)).softmax(-1)
            return (weights @ v[:, :, None]).flatten(1, 2)
        weights = (q @ self.repeated(k).transpose(2, 3) / self.head_dim**0.5).softmax(-1)
        return weights @ self.repeated(v)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        k, v = self.kv(tokens).chunk(2, -1) if self.joint else (self.k(tokens), self.v(tokens))
        q, k, v = self.heads(self.q(tokens)), self.heads(k), self.heads(v)
        q, k = (rotated(q), rotated(k)) if self.rotary else (q, k)
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).reshape(x.shape)
