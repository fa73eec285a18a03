"""Networks whose cuts come out wrong if the rule for one of their operators is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.testing import randomise_


class Net(nn.Module):
    """Network of named layers whose forward is a function of the network and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.code = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Convolution that keeps the image size."""
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def net(forward: Callable[[Any, Tensor], Tensor], **make: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a randomised network in double precision and eval mode."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = {name: made() if callable(made) else made for name, made in make.items()}
        return randomise_(Net(forward, **layers)).double().eval()

    return build


def a(channels: int = 6, **options: Any) -> Callable[[], nn.Module]:
    """First convolution of a network."""
    return lambda: conv(3, channels, **options)


def z(channels: int = 6, kernel: int = 1) -> Callable[[], nn.Module]:
    """Last convolution of a network."""
    return lambda: conv(channels, 2, kernel)


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def _heads(m: Any, x: Tensor) -> Tensor:
    """Attention with the number of heads in an attribute."""
    tokens = _tokens(m.a(x))
    b, n = tokens.shape[:2]
    heads = -1 if m.free else m.heads
    q, k, v = (layer(tokens).reshape(b, n, heads, m.dim).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v) if m.fused else (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return m.z(m.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (4, 5)))


def attention(fused: bool, free: bool = False) -> Callable[[], nn.Module]:
    """Attention with three heads of three channels."""
    linear = lambda: nn.Linear(9, 9)  # noqa: E731
    options = {"heads": 3, "dim": 3, "fused": fused, "free": free}
    return net(_heads, a=a(9), q=linear, k=linear, v=linear, out=linear, z=z(9), **options)


def _shuffle(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def _halves(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:].sigmoid()


RESIDUAL = net(lambda m, x: m.z(m.a(x).relu() + m.b(x)), a=a(), b=a(), z=z())
NORMED = net(lambda m, x: m.z(m.n(m.a(x)).relu()), a=a(), n=lambda: nn.BatchNorm2d(6), z=z())
TWO = net(lambda m, x: m.z(torch.cat([m.a(x), m.b(x)], 1)), a=a(), b=a(), z=z(12))
THREE = net(lambda m, x: m.z(torch.cat([m.a(x), m.b(x), m.c(x)], 1)), a=a(), b=a(4), c=a(8), z=z(18))
PLAIN = net(lambda m, x: m.z(m.b(m.a(x)).relu()), a=a(), b=lambda: conv(6, 6), z=z())
GROUPED = net(lambda m, x: m.z(m.b(m.a(x))), a=a(12), b=lambda: conv(12, 6, groups=2), z=z())
DEPTHWISE = net(lambda m, x: m.z(m.b(m.a(x))), a=a(), b=lambda: conv(6, 12, groups=6), z=z(12))
UP = net(lambda m, x: m.z(m.b(m.a(x))), a=a(), b=lambda: nn.ConvTranspose2d(6, 6, 2, 2), z=z())
UP_GROUPED = net(
    lambda m, x: m.z(m.b(m.a(x))), a=a(), b=lambda: nn.ConvTranspose2d(6, 6, 2, 2, groups=2), z=z()
)
LAST = net(
    lambda m, x: m.z((m.a(x).permute(0, 2, 3, 1) * m.s).permute(0, 3, 1, 2)),
    a=a(5),
    s=lambda: nn.Parameter(torch.rand(5)),
    z=z(5),
)
HALVES = net(lambda m, x: m.z(_halves(m.a(x))), a=a(12), z=z())
SLICED = net(lambda m, x: m.z(m.a(x)[:, : m.keep]), a=a(), z=z(4), keep=4)
NUMBERED = net(lambda m, x: m.z(m.a(x)[:, 2:5]), a=a(9), z=z(3))
CHUNKED_CAT = net(lambda m, x: m.z(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=a(12), z=z(12))
LISTED = net(lambda m, x: m.z(m.a(x).split(m.parts, 1)[1]), a=a(12), z=z(6), parts=lambda: [6, 6])
FLAT = net(lambda m, x: m.z(F.adaptive_avg_pool2d(m.a(x), 2).flatten(1)), a=a(4), z=lambda: nn.Linear(16, 2))
PIXELS = net(lambda m, x: m.z(F.pixel_shuffle(m.a(x), 2)), a=a(12), z=z(3))
UNPIXELS = net(lambda m, x: m.z(F.pixel_unshuffle(m.a(x)[..., :4, :4], 2)), a=a(4), z=z(16))
FLIPPED = net(lambda m, x: m.z(m.a(x).flip(1)), a=a(), z=z())
SHUFFLED = net(lambda m, x: m.z(_shuffle(m, m.a(x))), a=a(9), z=z(9), groups=3)
BUILTIN = net(lambda m, x: m.z(F.channel_shuffle(m.a(x), 3)), a=a(12), z=z(12))
STACKED = net(lambda m, x: m.z(torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=a(), b=a(), z=z())
PILED = net(lambda m, x: m.z(torch.stack([m.a(x), m.b(x)] * 3, 1).flatten(1, 2)), a=a(), b=a(), z=z(36))
WOVEN = net(lambda m, x: m.z(torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)), a=a(), b=a(), z=z(12))
ROLLED = net(lambda m, x: m.z(torch.roll(m.a(x), 1, 1)), a=a(), z=z())
REPEATED = net(lambda m, x: m.z(m.a(x).repeat(1, 2, 1, 1)), a=a(), z=z(12))
GLU = net(lambda m, x: m.z(F.glu(m.a(x), 1)), a=a(12), z=z())
PRELU = net(lambda m, x: m.z(m.p(m.a(x))), a=a(), p=lambda: nn.PReLU(6), z=z())
PADDED = net(lambda m, x: m.z(F.pad(m.a(x), (0, 0, 0, 0, 2, 1))), a=a(), z=z(9))
PICKED = net(lambda m, x: m.z(m.a(x)[:, [0, 3, 1, 2]]), a=a(), z=z(4))
GATED = net(
    lambda m, x: m.z(m.a(x) * m.s[:, None, None]), a=a(), s=lambda: nn.Parameter(torch.rand(6)), z=z()
)
MASKED = net(lambda m, x: m.z(m.n(m.a(x))), a=a(), n=lambda: nn.InstanceNorm2d(6, affine=True), z=z())
LAYERED = net(
    lambda m, x: m.z(m.n(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    a=a(),
    n=lambda: nn.LayerNorm(6),
    z=z(),
)
IN_GROUPS = net(lambda m, x: m.z(m.n(m.a(x))), a=a(), n=lambda: nn.GroupNorm(1, 6), z=z())
SQUARE = net(
    lambda m, x: m.z(m.b(_tokens(m.a(x))).mT.unflatten(2, (4, 5))), a=a(), b=lambda: nn.Linear(6, 6), z=z()
)
UNFOLDED = net(
    lambda m, x: m.z(m.b(F.unfold(m.a(x), 3, padding=1)).unflatten(2, (4, 5))),
    a=a(),
    b=lambda: nn.Conv1d(54, 6, 1),
    z=z(),
)


def shared_weights() -> nn.Module:
    model: Any = net(
        lambda m, x: m.z(m.c(m.b(m.a(x)).relu())), a=a(), b=lambda: conv(6, 6), c=lambda: conv(6, 6), z=z()
    )()
    model.c.weight = model.b.weight
    return model


def _swin(m: Any, x: Tensor) -> Tensor:
    tokens = _tokens(m.a(x))
    b, n, c = tokens.shape
    y = m.b(tokens).reshape(b, n, 2, c)
    return m.z((y[:, :, 0] * y[:, :, 1].sigmoid()).mT.reshape(b, c, 4, 5))


FOREIGN = net(_swin, a=a(), b=lambda: nn.Linear(6, 12), z=z())
