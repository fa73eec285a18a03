"""Networks, images and one call that cuts and repairs, for the tests of compensation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import trace
from lightning_prune.compensation import (
    CompensationSettings,
    cut_and_compensate_,
)
from tests.support.nets import Attention, Small, random_units

IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(24, 7, 12, generator=torch.Generator().manual_seed(4))


def repaired(model: nn.Module, inputs: Tensor, share: float = 0.4, seed: int = 0, remove=None, **settings):
    """Cut and repair a model; return the report."""
    graph = trace(model, inputs[:2])
    remove = random_units(graph, seed, share) if remove is None else graph.layers[remove[0]][remove[1]]
    return cut_and_compensate_(model, graph, remove, [inputs], settings=CompensationSettings(**settings))[1]


class Siamese(nn.Module):
    """A backbone that is called twice, with norms of its own for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        views = [
            norm(self.second(F.relu(self.first(view)))).relu().mean((2, 3))
            for norm, view in zip(self.norms, (x, x.flip(3) * 2), strict=True)
        ]
        return self.head(torch.cat(views, 1))


class Tied(nn.Module):
    """Two layers with the same weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.up, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.again.weight = self.up.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.up(x))
        return self.head(F.relu(self.again(x)))


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SequenceFirst(nn.Module):
    """An encoder that lists tokens before images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder, self.head = nn.Linear(12, 12), encoder(batch_first=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).transpose(0, 1)).transpose(0, 1))


def grouped() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 12, 1),
        ),
        *(nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12), nn.Conv2d(12, 2, 1)),
    )


NETWORKS = {
    "small": (Small, IMAGES),
    "grouped": (grouped, IMAGES),
    "siamese": (Siamese, IMAGES),
    "tied": (Tied, TOKENS),
    "attention": (lambda: nn.Sequential(nn.Linear(12, 12), Attention(), nn.Linear(12, 5)), TOKENS),
    "encoder": (lambda: nn.Sequential(nn.Linear(12, 12), encoder(), nn.Linear(12, 3)), TOKENS),
    "sequence first": (SequenceFirst, TOKENS),
}
