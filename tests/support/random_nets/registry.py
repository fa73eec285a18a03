"""Specs of random networks, the registry of their blocks, and helpers that blocks are built with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, int, int]
Body = Sequence["N"]
Builder = Callable[..., nn.Module]

BLOCKS: dict[str, Builder] = {}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {}
BODIES: dict[str, int] = {}
#: Blocks that combine activations with those of other channels, always or with a certain option.
NOT_BY_WEIGHTS = {"Attention", "ChannelSum", "Distances", "Dynamic"}
OPTIONS_NOT_BY_WEIGHTS = {
    ("Select", "score", "sum"),
    ("Einops", "style", "heads"),
    ("Number", "style", "layer_norm"),
    ("Tied", "style", "slice"),  # a part of a weight is no layer, and its inputs are not known as such
    ("Tied", "style", "linear"),  # the second use reads filters, as inputs
    ("Tied", "style", "transposed"),
}
#: Blocks whose sizes or branches depend on values, so that a cut changes the costs.
BY_VALUES = {"Select", "Experts", "Branch"}
#: Blocks with products that torch's counter does not see.
NOT_COUNTED = {"Deformable", "Distances", "GroupedQueries", "Einops", "Positions"}
MAX_CHANNELS = 32
MAX_PIXELS = 144

pick = st.sampled_from
widths = pick([4, 2, 3, 5, 6, 8, 9, 12])
small = pick([2, 1, 3, 4])
flags = st.booleans()
norms = pick(["none", "batch", "batch", "batch", "group", "layer", "instance", "each"])
activations = pick(["relu", "none", "silu", "gelu", "tanh", "inplace", "prelu", "hardswish"])


class N:
    """A node of a spec: the name of a block, its bodies and its options."""

    def __init__(self, kind: str, /, *bodies: Body, **options: Any) -> None:
        self.kind, self.bodies, self.options = kind, bodies, options

    def __repr__(self) -> str:
        arguments = [*map(repr, self.bodies), *(f"{name}={value!r}" for name, value in self.options.items())]
        return f"N({', '.join([repr(self.kind), *arguments])})"

    def is_by_weights(self) -> bool:
        """Whether channels are read only by weights within this block, apart from its bodies."""
        options = {(self.kind, name, value) for name, value in self.options.items()}
        pairs = self.kind == "GroupedQueries" and (self.options["kv"] > 1 or self.options["times"] == 1)
        return self.kind not in NOT_BY_WEIGHTS and not pairs and not options & OPTIONS_NOT_BY_WEIGHTS

    def nodes(self) -> Iterator[N]:
        """Yield this node and all nodes of its bodies."""
        yield self
        for body in self.bodies:
            for node in body:
                yield from node.nodes()


def block(bodies: int = 0, **options: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Register a block with the number of its bodies and the strategies of its options."""

    def register(builder: Any) -> Any:
        name = builder.__name__
        BLOCKS[name], OPTIONS[name], BODIES[name] = builder, options, bodies
        return builder

    return register


def divisor(channels: int, limit: int) -> int:
    """Return the largest divisor of ``channels`` up to ``limit``."""
    return max(d for d in range(1, max(limit, 1) + 1) if channels % d == 0)


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """Return channels, height and width of the output of ``module`` for an input of ``shape``."""
    with torch.no_grad():
        # A copy, since modules keep what they compute.
        out = copy.deepcopy(module).eval()(torch.zeros(2, *shape))
    return tuple(out.shape[1:])


def chain(body: Body, shape: Shape) -> nn.Sequential:
    """Build the blocks in sequence; where an output is too large, add layers that reduce it."""
    layers = nn.Sequential()
    for node in body:
        for reducer in _reducers(shape):
            layers.append(reducer)
            shape = shape_after(reducer, shape)
        layers.append(BLOCKS[node.kind](shape, *node.bodies, **node.options))
        shape = shape_after(layers[-1], shape)
    return layers


def _reducers(shape: Shape) -> list[nn.Module]:
    channels, height, width = shape
    pool = [nn.MaxPool2d(2)] if height * width > MAX_PIXELS else []
    return [*pool, nn.Conv2d(channels, 8, 1)] if channels > MAX_CHANNELS else [*pool]


def fit(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` resized to the height and width of ``like``."""
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(x, (height, width))


def norm(kind: str, shape: Shape) -> nn.Module:
    """Build a normalisation layer by its name."""
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
    """Build an activation with f(0) = 0 by its name."""
    if kind == "prelu":
        return nn.PReLU(channels)
    activations = {
        "relu": nn.ReLU(), "inplace": nn.ReLU(inplace=True), "silu": nn.SiLU(), "gelu": nn.GELU(), "tanh": nn.Tanh(),
        "hardswish": nn.Hardswish(), "none": nn.Identity(),
    }  # fmt: skip
    return activations[kind]


class LayerNorm(nn.Module):
    """Layer norm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
