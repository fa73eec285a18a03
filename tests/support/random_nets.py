"""Random networks: a hypothesis strategy of specs, and the modules that they describe.

A spec is a list of :class:`N` nodes, each a block's name with its options and bodies, which are specs again.
Printed, it is the Python that makes it. Every spec builds, whatever the number of channels that reach a block
(a number of groups is rounded down to a divisor), so that hypothesis can shrink freely.

All activations have f(0) = 0 and all gates multiply, so the dead-filter oracle holds. Blocks in which
activations meet activations other than position by position are ``NOT_BY_WEIGHTS``: there the zeroed-consumer
oracle does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.testing import randomise_

Shape = tuple[int, int, int]
Body = Sequence["N"]
Builder = Callable[..., nn.Module]

BLOCKS: dict[str, Builder] = {}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {}
BODIES: dict[str, int] = {}
NOT_BY_WEIGHTS = {"Attention", "ChannelSum", "Dynamic"}
MOST_CHANNELS = 32
MOST_PIXELS = 144

pick = st.sampled_from
widths = pick([4, 2, 3, 5, 6, 8, 9, 12])
small = pick([2, 1, 3, 4])
flags = st.booleans()
norms = pick(["none", "batch", "batch", "batch", "group", "layer", "instance", "each"])
activations = pick(["relu", "none", "silu", "gelu", "tanh", "inplace", "prelu", "hardswish"])


class N:
    """A block of a random network, by name, with its bodies and options."""

    def __init__(self, kind: str, /, *bodies: Body, **options: Any) -> None:
        self.kind, self.bodies, self.options = kind, bodies, options

    def __repr__(self) -> str:
        inside = [*map(repr, self.bodies), *(f"{name}={value!r}" for name, value in self.options.items())]
        return f"N({', '.join([repr(self.kind), *inside])})"

    def nodes(self) -> Iterator[N]:
        """This node and all inside it."""
        yield self
        for body in self.bodies:
            for node in body:
                yield from node.nodes()


@dataclass(frozen=True)
class Net:
    """A whole random network: blocks, how it ends, what else it returns, and the size of its input."""

    body: tuple[N, ...]
    head: str = "conv"
    outputs: str = "one"
    size: tuple[int, int] = (6, 6)

    def build(self, seed: int = 0) -> nn.Module:
        """The module, in double precision, with random norms and biases."""
        torch.manual_seed(seed)
        model = Network(self)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(2 / max(parameter[0].numel(), 1)) ** 0.5)
        return randomise_(model, seed).double().eval()

    def example(self) -> Tensor:
        """An input."""
        return torch.randn(2, 3, *self.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def by_weights(self) -> bool:
        """Are weights the only consumers of channels?"""
        return not {node.kind for root in self.body for node in root.nodes()} & NOT_BY_WEIGHTS


def block(bodies: int = 0, **options: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Register a block: how many bodies it has and the strategies of its options."""

    def register(builder: Any) -> Any:
        name = builder.__name__
        BLOCKS[name], OPTIONS[name], BODIES[name] = builder, options, bodies
        return builder

    return register


def divisor(channels: int, wanted: int) -> int:
    """The largest divisor of ``channels`` up to ``wanted``."""
    return max(d for d in range(1, max(wanted, 1) + 1) if channels % d == 0)


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """Channels, height and width of what ``module`` makes of an input of ``shape``."""
    training = module.training
    with torch.no_grad():
        out = module.eval()(torch.zeros(2, *shape))
    module.train(training)
    return tuple(out.shape[1:])


def chain(body: Body, shape: Shape) -> nn.Sequential:
    """The blocks one after the other; what grew too large is brought down in between."""
    layers = nn.Sequential()
    for node in body:
        for smaller in _smaller(shape):
            layers.append(smaller)
            shape = shape_after(smaller, shape)
        layers.append(BLOCKS[node.kind](shape, *node.bodies, **node.options))
        shape = shape_after(layers[-1], shape)
    return layers


def _smaller(shape: Shape) -> list[nn.Module]:
    channels, height, width = shape
    pool = [nn.MaxPool2d(2)] if height * width > MOST_PIXELS else []
    return [*pool, nn.Conv2d(channels, 8, 1)] if channels > MOST_CHANNELS else [*pool]


def fit(x: Tensor, like: Tensor) -> Tensor:
    """``x`` at the height and width of ``like``."""
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(x, (height, width))


def norm(kind: str, shape: Shape) -> nn.Module:
    """A normalisation by its name."""
    channels, height, width = shape
    if kind == "instance" and height * width > 1:
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(divisor(channels, 2), channels)
    if kind == "each":
        return nn.GroupNorm(channels, channels)
    if kind == "layer":
        return LayerNorm(channels)
    return nn.Identity() if kind == "none" else nn.BatchNorm2d(channels)


def activation(kind: str, channels: int) -> nn.Module:
    """An activation with f(0) = 0 by its name."""
    if kind == "prelu":
        return nn.PReLU(channels)
    found = {
        "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True), "silu": nn.SiLU(), "gelu": nn.GELU(), "tanh": nn.Tanh(),
        "hardswish": nn.Hardswish(), "none": nn.Identity(),
    }  # fmt: skip
    return found[kind]


class LayerNorm(nn.Module):
    """Over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Network(nn.Module):
    """Blocks, a head, and whatever else is returned."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        shape = (3, *net.size)
        self.outputs, self.head_kind = net.outputs, net.head
        self.blocks = chain([N("Conv"), *net.body], shape)
        shape = shape_after(self.blocks, shape)
        self.aux = nn.Conv2d(shape_after(self.blocks[:1], (3, *net.size))[0], 2, 1)
        flat = shape[0] if net.head in ("conv", "pool", "mean", "hidden") else shape[0] * shape[1] * shape[2]
        self.hidden = nn.Linear(flat, 5) if net.head == "hidden" else nn.Identity()
        self.head = (
            nn.Conv2d(flat, 3, 1) if net.head == "conv" else nn.Linear(5 if net.head == "hidden" else flat, 3)
        )

    def forward(self, x: Tensor) -> Any:
        first = self.blocks[0](x)
        features = self.blocks[1:](first)
        out = self.head(self.flat(features))
        if self.outputs == "features":
            return out, features
        if self.outputs == "dict":
            return {"out": out, "aux": [self.aux(first)]}
        if self.outputs == "train" and self.training:
            return out, self.aux(first)
        return out

    def flat(self, x: Tensor) -> Tensor:
        if self.head_kind == "conv":
            return x
        if self.head_kind == "pool":
            return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        if self.head_kind in ("mean", "hidden"):
            return F.relu(self.hidden(x.mean((2, 3))))
        if self.head_kind == "view":
            return x.contiguous().view(x.size(0), -1)
        if self.head_kind == "reshape":
            b, c, h, w = x.shape
            return x.reshape(b, c * h * w)
        if self.head_kind == "last":
            return x.permute(0, 2, 3, 1).flatten(1)
        return x.flatten(1)


HEADS = pick(["conv", "pool", "mean", "flatten", "view", "reshape", "last", "hidden"])
OUTPUTS = pick(["one", "one", "one", "train", "dict", "features"])
SIZES = pick([(6, 6), (5, 5), (8, 8), (7, 4), (3, 9)])


# -- plain layers -------------------------------------------------------------------------------------------


@block(
    out=widths, kernel=pick([1, 3]), stride=pick([1, 1, 2]), dilation=pick([1, 1, 2]), groups=small, bias=flags,
    norm=norms, act=activations,
)  # fmt: skip
def Conv(
    shape: Shape, out: int = 8, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1,
    bias: bool = False, norm: str = "batch", act: str = "relu",
) -> nn.Module:  # fmt: skip
    """Convolution, norm, activation."""
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
    """A filter, or some, for each channel."""
    conv = nn.Conv2d(shape[0], shape[0] * times, 3, padding=1, groups=shape[0], bias=bias)
    return _with_norm(conv, shape, norm, act)


@block(out=widths, groups=pick([1, 1, 2, 3, 99]), stride=pick([1, 2]), bias=flags, norm=norms)
def Up(shape: Shape, out: int, groups: int, stride: int, bias: bool, norm: str) -> nn.Module:
    """A transposed convolution; 99 groups stand for one per channel."""
    groups = divisor(shape[0], groups)
    out = shape[0] if groups == shape[0] else max(out // groups, 1) * groups
    conv = nn.ConvTranspose2d(shape[0], out, 2 if stride == 2 else 3, stride, 1, groups=groups, bias=bias)
    if min(shape[1:]) < 3:
        conv = nn.ConvTranspose2d(shape[0], out, 1, groups=groups, bias=bias)
    return _with_norm(conv, shape, norm, "relu")


@block(norm=norms, act=activations)
def Norm(shape: Shape, norm: str, act: str) -> nn.Module:
    """Norm and activation alone."""
    if norm == "none" and act == "inplace":
        act = "relu"  # what comes before may need its result for its own gradient
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


# -- gates --------------------------------------------------------------------------------------------------


@block(ratio=small, style=pick(["conv", "linear", "expand", "one"]))
class SqueezeExcite(nn.Module):
    def __init__(self, shape: Shape, ratio: int, style: str) -> None:
        super().__init__()
        channels, self.style = shape[0], style
        hidden = max(channels // ratio, 1)
        layer = nn.Linear if style == "linear" else lambda a, b: nn.Conv2d(a, b, 1)
        self.reduce, self.widen = layer(channels, hidden), layer(hidden, 1 if style == "one" else channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "linear":
            b, c, _, _ = x.size()
            gate = self.widen(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1).view(b, c))))
            return x * torch.sigmoid(gate).reshape(b, c, 1, 1)
        if self.style == "one":
            return x * torch.sigmoid(self.widen(F.silu(self.reduce(x))))
        gate = torch.sigmoid(self.widen(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return gate.expand_as(x) * x if self.style == "expand" else x.clone().mul_(gate)


@block(style=pick(["self", "chunk", "glu", "split", "view"]))
class Gate(nn.Module):
    def __init__(self, shape: Shape, style: str) -> None:
        super().__init__()
        self.style, self.width = style, shape[0]
        self.conv = nn.Conv2d(shape[0], shape[0] * (1 if style == "self" else 2), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.style == "self":
            return x * y.sigmoid()
        if self.style == "glu":
            return F.glu(y, 1)
        if self.style == "view":
            y = y.reshape(y.shape[0], 2, -1, *y.shape[2:])
            return y[:, 0] * y[:, 1].sigmoid()
        value, gate = y.chunk(2, 1) if self.style == "chunk" else torch.split(y, self.width, dim=1)
        return value * gate.sigmoid()


@block(radix=pick([2, 3]), style=pick(["stack", "view"]))
class SelectiveKernel(nn.Module):
    """Branches weighted by a softmax over the branches."""

    def __init__(self, shape: Shape, radix: int, style: str) -> None:
        super().__init__()
        channels, self.radix, self.style = shape[0], radix, style
        convs = [nn.Conv2d(channels, channels, 1 + 2 * (i % 2), padding=i % 2) for i in range(radix)]
        self.branches = nn.ModuleList(convs)
        self.reduce, self.widen = nn.Linear(channels, 4), nn.Linear(4, channels * radix)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([branch(x) for branch in self.branches], 1)
        weights = self.widen(F.relu(self.reduce(stacked.sum(1).mean((2, 3)))))
        if self.style == "stack":
            parts = [p.sigmoid() for p in weights.chunk(self.radix, 1)]
            return sum(s * p[..., None, None] for s, p in zip(stacked.unbind(1), parts, strict=True))
        weights = weights.reshape(x.shape[0], self.radix, -1).softmax(1)
        return (stacked * weights[..., None, None]).sum(1)


@block(how=pick(["sum", "mean", "max"]))
class ChannelSum(nn.Module):
    """A gate of one channel from all channels, as in CBAM."""

    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = x.amax(1, keepdim=True) if self.how == "max" else getattr(x, self.how)(1, keepdim=True)
        return x * self.conv(one).sigmoid()


# -- branches -----------------------------------------------------------------------------------------------


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
        found = {"x": x.clone(), "a": self.a(x.clone()), "b": self.b(x.clone())}
        parts = [found[letter] for letter in self.what]
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
        at = {"shape": half, "attribute": self.middle, "number": int(half), "numbers": int(self.parts[0])}
        if style == "negative":
            return x[:, : -self.middle], x[:, -self.middle :]
        at_ = at[style.rpartition("_")[2]]
        return x[:, :at_], x[:, at_:]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(self.even(x))
        a, b = self.a(first.clone()), self.match(self.b(second.clone()))
        b = fit(b, a)
        if self.join == "sum":
            return a + b
        return a if self.join == "one" else torch.cat([a, b] if self.join == "cat" else [b, a], 1)


@block(bodies=1, hidden=pick([2, 3, 4]), repeats=pick([1, 2]), style=pick(["chunk", "split"]))
class C2f(nn.Module):
    """As in YOLOv8: halves, each further block on the last, all concatenated."""

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
    """As in FasterNet: some channels are worked on, the others pass."""

    def __init__(self, shape: Shape, body: Body, style: str) -> None:
        super().__init__()
        self.worked = max(shape[0] // 3, 1)
        self.rest, self.style = shape[0] - self.worked, style
        self.body = chain(body, (self.worked, *shape[1:]))
        after = shape_after(self.body, (self.worked, *shape[1:]))[0]
        self.back = nn.Conv2d(after, self.worked, 1) if after != self.worked else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "list" and self.rest:
            a, b = torch.split(x, [self.worked, self.rest], dim=1)
            return torch.cat((fit(self.back(self.body(a.clone())), b), b), 1)
        a = fit(self.back(self.body(x[:, : self.worked].clone())), x)
        if self.style == "write":
            x = x.clone()
            x[:, : self.worked] = a
            return x
        return torch.cat((a, x[:, self.worked :]), 1)


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
    """A module called twice, or two modules with one weight."""

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


# -- channels that move -------------------------------------------------------------------------------------


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
    """Between channels and pixels."""

    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind, self.r = kind, 2
        wanted = 4 * -(-shape[0] // 4) if kind in ("shuffle", "depth_to_space") else min(shape[0], 4)
        self.ready = nn.Conv2d(shape[0], wanted, 1)
        self.conv = nn.Conv1d(wanted * 9, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ready(x)
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


# -- tokens -------------------------------------------------------------------------------------------------


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
    """Linear layers over the pixels, without biases: a channel of zeros stays one."""

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
        """Queries, keys and values, (b, heads, n, d)."""
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
    """Linear maps written out, with a weight that belongs to no layer."""

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
    """A convolution over another number of dimensions."""

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
    """As in Swin: the body sees windows as images of their own; odd sizes are padded."""

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
    """Activations that meet activations as weights would."""

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


# -- the strategy -------------------------------------------------------------------------------------------

PLAIN = [name for name, bodies in BODIES.items() if not bodies]
NESTING = [name for name, bodies in BODIES.items() if bodies]


@st.composite
def nodes(draw: Any, depth: int, kinds: Sequence[str] | None = None) -> N:
    """A block, of some ``kinds`` if they are given; blocks with bodies only while ``depth`` lasts."""
    plain = pick(["Conv", "Conv", *PLAIN])
    kind = draw(pick(kinds) if kinds else st.one_of(plain, pick(NESTING)) if depth else plain)
    bodies = [draw(st.lists(nodes(max(depth - 1, 0)), max_size=2)) for _ in range(BODIES[kind])]
    return N(kind, *bodies, **{name: draw(option) for name, option in OPTIONS[kind].items()})


@st.composite
def nets(draw: Any, depth: int = 2, only: str = "") -> Net:
    """A random network; of blocks of kind ``only`` if that is given (and anything inside them)."""
    body = draw(st.lists(nodes(depth, [only] if only else None), min_size=1, max_size=4))
    return Net(tuple(body), draw(HEADS), draw(OUTPUTS), draw(SIZES))
