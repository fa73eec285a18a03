"""Blocks with branches: sums, concatenations, splits, shared weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.support.random_nets.registry import Body, Shape, block, chain, fit, flags, pick, shape_after


@block(bodies=1, pool=flags)
class Residual(nn.Module):
    def __init__(self, shape: Shape, body: Body, pool: bool) -> None:
        super().__init__()
        self.body, self.pool = chain(body, shape), pool
        after = shape_after(self.body, shape)
        self.shortcut = nn.Identity() if after[0] == shape[0] else nn.Conv2d(shape[0], after[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x.clone())
        y = self.body(x)
        y = y + fit(shortcut, y)
        return y + y.mean((2, 3), keepdim=True) if self.pool else y


@block(bodies=2, what=pick(["ab", "xa", "ax", "axb", "xx", "aa", "bxa"]), tail=flags)
class Cat(nn.Module):
    def __init__(self, shape: Shape, first: Body, second: Body, what: str, tail: bool) -> None:
        super().__init__()
        self.what = what
        self.a = chain(first, shape) if "a" in what else nn.Identity()
        self.b = chain(second, shape) if "b" in what else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branches = {"x": x.clone(), "a": self.a(x.clone()), "b": self.b(x.clone())}
        parts = [branches[letter] for letter in self.what]
        return torch.cat([fit(part, parts[0]) for part in parts], dim=1)


@block(growth=pick([2, 3, 4]), layers=pick([2, 3]))
class Dense(nn.Module):
    def __init__(self, shape: Shape, growth: int, layers: int) -> None:
        super().__init__()
        inputs = [shape[0] + i * growth for i in range(layers)]
        convs = [nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, growth, 1)) for n in inputs]
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            features.append(conv(torch.cat(features, 1)))
        return torch.cat(features, 1)


SPLITS = [
    "chunk", "split_attribute", "split_number", "split_shape", "split_list", "slice_shape", "slice_attribute",
    "slice_number", "unequal_list", "unequal_numbers", "view", "narrow", "tensor_split", "negative",
]  # fmt: skip


@block(bodies=2, style=pick(SPLITS), join=pick(["cat", "swap", "sum", "one"]))
class Split(nn.Module):
    def __init__(self, shape: Shape, first: Body, second: Body, style: str, join: str) -> None:
        super().__init__()
        channels = shape[0] + shape[0] % 2
        self.even = nn.Identity() if channels == shape[0] else nn.Conv2d(shape[0], channels, 1)
        self.style, self.join, self.middle = style, join, channels // 2
        self.parts = [self.middle, self.middle]
        if style.startswith("unequal"):
            self.parts = [max(channels // 3, 1), channels - max(channels // 3, 1)]
        self.a = chain(first, (self.parts[0], *shape[1:]))
        self.b = chain(second, (self.parts[1], *shape[1:]))
        wide, other = (
            shape_after(m, (n, *shape[1:]))[0] for m, n in zip((self.a, self.b), self.parts, strict=True)
        )
        self.match = nn.Conv2d(other, wide, 1) if join == "sum" and wide != other else nn.Identity()

    def split(self, x: Tensor) -> Sequence[Tensor]:
        style, half = self.style, x.shape[1] // 2
        if style == "chunk":
            return x.chunk(2, dim=1)
        if style == "tensor_split":
            return torch.tensor_split(x, 2, dim=1)
        if style == "view":
            parts = x.contiguous().view(x.shape[0], 2, -1, *x.shape[2:])
            return parts[:, 0], parts[:, 1]
        if style == "narrow":
            return x.narrow(1, 0, self.middle), x.narrow(1, self.middle, self.middle)
        if style.startswith("s") and style.startswith("split"):
            sizes = {"attribute": self.middle, "number": int(half), "shape": half, "list": self.parts}
            return x.split(sizes[style[6:]], dim=1)
        if style == "unequal_list":
            return torch.split(x, self.parts, 1)
        borders = {
            "shape": half,
            "attribute": self.middle,
            "number": int(half),
            "numbers": int(self.parts[0]),
        }
        if style == "negative":
            return x[:, : -self.middle], x[:, -self.middle :]
        border = borders[style.rpartition("_")[2]]
        return x[:, :border], x[:, border:]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(self.even(x))
        a, b = self.a(first.clone()), self.match(self.b(second.clone()))
        b = fit(b, a)
        if self.join == "sum":
            return a + b
        return a if self.join == "one" else torch.cat([a, b] if self.join == "cat" else [b, a], 1)


@block(bodies=1, hidden=pick([2, 3, 4]), repeats=pick([1, 2]), style=pick(["chunk", "split"]))
class C2f(nn.Module):
    """As in YOLOv8: split in halves, apply each block to the result of the one before, concatenate all."""

    def __init__(self, shape: Shape, body: Body, hidden: int, repeats: int, style: str) -> None:
        super().__init__()
        self.c, self.style = hidden, style
        self.first = nn.Conv2d(shape[0], 2 * hidden, 1)
        inner, self.blocks, total = (hidden, *shape[1:]), nn.ModuleList(), 2 * hidden
        for _ in range(repeats):
            self.blocks.append(chain(body, inner))
            inner = shape_after(self.blocks[-1], inner)
            total += inner[0]
        self.last = nn.Conv2d(total, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        parts = list(y.chunk(2, 1) if self.style == "chunk" else y.split((self.c, self.c), 1))
        parts.extend(block(parts[-1].clone()) for block in self.blocks)
        return self.last(torch.cat([fit(part, parts[0]) for part in parts], 1))


@block(scale=pick([2, 3, 4]), width=pick([2, 3]), style=pick(["attribute", "chunk"]))
class Res2(nn.Module):
    def __init__(self, shape: Shape, scale: int, width: int, style: str) -> None:
        super().__init__()
        self.width, self.scale, self.style = width, scale, style
        self.first, self.last = nn.Conv2d(shape[0], width * scale, 1), nn.Conv2d(width * scale, shape[0], 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        parts = y.split(self.width, 1) if self.style == "attribute" else y.chunk(self.scale, 1)
        outs, last = [], None
        for conv, part in zip(self.convs, parts, strict=False):
            last = conv(part if last is None else last + part).relu()
            outs.append(last)
        return x + self.last(torch.cat([*outs, parts[len(self.convs)]], 1))


@block(bodies=1, style=pick(["list", "cut", "write"]))
class Partial(nn.Module):
    """As in FasterNet: apply the body to some channels, and pass the others on unchanged."""

    def __init__(self, shape: Shape, body: Body, style: str) -> None:
        super().__init__()
        self.active = max(shape[0] // 3, 1)
        self.rest, self.style = shape[0] - self.active, style
        self.body = chain(body, (self.active, *shape[1:]))
        after = shape_after(self.body, (self.active, *shape[1:]))[0]
        self.back = nn.Conv2d(after, self.active, 1) if after != self.active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "list" and self.rest:
            a, b = torch.split(x, [self.active, self.rest], dim=1)
            return torch.cat((fit(self.back(self.body(a.clone())), b), b), 1)
        a = fit(self.back(self.body(x[:, : self.active].clone())), x)
        if self.style == "write":
            x = x.clone()
            x[:, : self.active] = a
            return x
        return torch.cat((a, x[:, self.active :]), 1)


@block(ratio=pick([2, 3]))
class Ghost(nn.Module):
    def __init__(self, shape: Shape, ratio: int) -> None:
        super().__init__()
        self.out = shape[0]
        hidden = -(-shape[0] // ratio)
        self.primary = nn.Sequential(nn.Conv2d(shape[0], hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU())
        self.cheap = nn.Conv2d(hidden, hidden * (ratio - 1), 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.out]


@block(bodies=1, dim=pick([0, 1, 2, -1]), how=pick(["sum", "mean", "interleave", "pick", "cat"]))
class Stack(nn.Module):
    def __init__(self, shape: Shape, body: Body, dim: int, how: str) -> None:
        super().__init__()
        self.dim, self.how, self.a = dim, how, chain(body, shape)
        self.b = nn.Conv2d(shape[0], shape_after(self.a, shape)[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x.clone())
        pair = [a, fit(self.b(x), a)]
        if self.how == "interleave":
            return torch.stack(pair, 2).flatten(1, 2)
        if self.how == "cat":
            y = torch.stack(pair, 1)
            return y.reshape(y.shape[0], 2 * a.shape[1], *a.shape[2:])
        stacked = torch.stack(pair, self.dim)
        return stacked.select(self.dim, 1) if self.how == "pick" else getattr(stacked, self.how)(self.dim)


@block(bodies=1, tied=flags)
class Shared(nn.Module):
    """A module that is called twice, or two modules that share a weight."""

    def __init__(self, shape: Shape, body: Body, tied: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(shape[0], shape[0], 3, padding=1)
        self.second = nn.Conv2d(shape[0], shape[0], 3, padding=1) if tied else self.first
        if tied:
            self.second.weight = self.first.weight
        self.body = chain(body, shape)
        after = shape_after(self.body, shape)
        self.back = nn.Conv2d(after[0], shape[0], 1) if after[0] != shape[0] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.back(self.body(self.first(x).relu()))).tanh()
