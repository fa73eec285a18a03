"""Networks in which something does not follow a cut by itself: caches, branches, numbers, grouped heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.mutation_networks import a, conv, net, z


def _scaled_once(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if "scale" not in m.kept:
        m.kept["scale"] = m.s.exp()[:, None, None]
    return m.z(y * m.kept["scale"])


def _halved_once(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if "half" not in m.kept:
        m.kept["half"] = y.shape[1] // 2
    half = m.kept["half"]
    return m.z(y[:, :half] * y[:, half:].sigmoid())


SCALED_ONCE = net(_scaled_once, a=a(), z=z(), s=lambda: nn.Parameter(torch.rand(6)), kept=dict)
HALVED_ONCE = net(_halved_once, a=a(12), z=z(), kept=dict)
BRANCHES = net(
    lambda m, x: m.z(m.b(m.a(x)) if x.mean() > 0 else m.c(m.a(x))),
    a=a(),
    b=lambda: conv(6, 6),
    c=lambda: conv(6, 6),
    z=z(),
)
DIVIDED = net(lambda m, x: m.z(m.a(x) / torch.tensor(m.a(x).shape[1])), a=a(), z=z())
ATTENDED = net(lambda m, x: m.z(_attention(m, m.a(x), m.a(x).shape[1] ** -0.5)), a=a(), z=z())
RANGED = net(lambda m, x: m.z(m.a(x) / torch.arange(m.a(x).shape[1]).sum()), a=a(), z=z())


def _attention(m: Any, image: Tensor, scale: float) -> Tensor:
    tokens = image.flatten(2).transpose(1, 2)[:, None]
    out = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, scale=scale)
    return out[:, 0].transpose(1, 2).unflatten(2, image.shape[2:])


def _queries(m: Any, x: Tensor) -> Tensor:
    """Attention of four heads of queries to two heads of keys and values."""
    tokens = m.a(x).flatten(2).transpose(1, 2)
    q, k, v = (layer(tokens).unflatten(2, (-1, 2)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    if m.fused:
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    else:
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        y = (q @ k.mT).softmax(-1) @ v
    return m.z(m.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (4, 5)))


def queries(fused: bool) -> Callable[[], nn.Module]:
    """Grouped queries, by fused attention or by repeated keys and values."""
    layers = {"q": lambda: nn.Linear(6, 8), "k": lambda: nn.Linear(6, 4), "v": lambda: nn.Linear(6, 4)}
    return net(_queries, a=a(), z=z(), out=lambda: nn.Linear(8, 6), fused=fused, **layers)


QUERIES, FUSED_QUERIES = queries(False), queries(True)


@functools.lru_cache
def _width(layer: nn.Conv2d) -> int:
    return layer.out_channels


CACHED_WIDTH = net(
    lambda m, x: m.z(m.a(x).reshape(x.shape[0], _width(m.a), -1).unflatten(2, x.shape[2:])), a=a(), z=z()
)
