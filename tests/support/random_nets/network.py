"""A whole random network: blocks, a head, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.testing import randomise_
from tests.support.random_nets.registry import BY_VALUES, NOT_COUNTED, N, chain, pick, shape_after

HEADS = pick(["conv", "pool", "mean", "flatten", "view", "reshape", "last", "hidden"])
OUTPUTS = pick(["one", "one", "one", "train", "dict", "features", "selected"])
SIZES = pick([(6, 6), (5, 5), (8, 8), (7, 4), (3, 9)])


@dataclass(frozen=True)
class Net:
    """The spec of a random network.

    Attributes:
        body: its blocks.
        head: kind of head.
        outputs: kind of output.
        size: height and width of the input.
        others: whether the trace is given the further examples too.
    """

    body: tuple[N, ...]
    head: str = "conv"
    outputs: str = "one"
    size: tuple[int, int] = (6, 6)
    others: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """Build the module, in double precision, with random norms and biases."""
        torch.manual_seed(seed)
        model = Network(self)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(2 / max(parameter[0].numel(), 1)) ** 0.5)
        return randomise_(model, seed).double().eval()

    def example(self) -> Tensor:
        """Return an example input."""
        return torch.randn(2, 3, *self.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def other_examples(self) -> list[Tensor]:
        """Return further inputs, which may take other branches."""
        return [-2 * self.example(), self.example().flip(0, 3) + 1]

    def nodes(self) -> Iterator[N]:
        """Yield all nodes."""
        for root in self.body:
            yield from root.nodes()

    def by_weights(self) -> bool:
        """Whether channels are read only by weights, so that the zeroed-consumer oracle is valid."""
        return all(node.is_by_weights() for node in self.nodes())

    def keeps_constants(self) -> bool:
        """Whether a forward keeps tensors of the channels' number, which then pin these."""
        return any(node.kind == "Cached" and node.options["style"] == "once" for node in self.nodes())

    def is_counted(self) -> bool:
        """Whether torch counts all MACs."""
        return not {node.kind for node in self.nodes()} & NOT_COUNTED

    def by_values(self) -> bool:
        """Whether sizes or branches depend on values."""
        return bool({node.kind for node in self.nodes()} & BY_VALUES)


class Network(nn.Module):
    """The module of a spec: blocks, a head, and an auxiliary head."""

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
        out = self.head(self.flatten(features))
        if self.outputs == "features":
            return out, features
        if self.outputs == "dict":
            return {"out": out, "aux": [self.aux(first)]}
        if self.outputs == "selected":
            return out, self.selected(first)
        if self.outputs == "train" and self.training:
            return out, self.aux(first)
        return out

    def selected(self, x: Tensor) -> Tensor:
        """Return the scores of the pixels that score highest, (number of them, 2), as detectors return objects."""
        scores = self.aux(x).permute(0, 2, 3, 1).flatten(0, 2)
        return scores[scores[:, 0] > 0.1]

    def flatten(self, x: Tensor) -> Tensor:
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
