"""Helpers for tests of latency: a network with every kind of operator, and times that are the same everywhere."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import LatencyTable
from lightning_prune.latency.calibration import Correction
from lightning_prune.latency.interpolation import Lookup
from lightning_prune.latency.store import Measurements

IMAGE = torch.zeros(1, 3, 12, 12)


class Mixed(nn.Module):
    """A network with plain, grouped, depthwise and transposed convolutions, norms and a concatenation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardswish(inplace=True)
        )
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        late = self.up(self.depthwise(torch.relu(self.norm(self.grouped(early)))))
        both = torch.cat([nn.functional.interpolate(early, scale_factor=2), late], 1)
        return self.head(both.mean((2, 3)))


def table(**arguments: Any) -> LatencyTable:
    """Return a table for one thread, without random cuts."""
    return LatencyTable(**{"threads": 1, "cuts": 0, **arguments})


def steadily_rising(measured: Measurements) -> Measurements:
    """Replace times by the product of the channel counts: real times of a tiny network may rise when channels go."""
    entries = {}
    for signature, curve in measured.entries.items():
        axes = curve.lookup.axes
        values = tuple(1000.0 * math.prod(counts) for counts in product(*axes))
        entries[signature] = replace(curve, lookup=Lookup(axes, values))
    return replace(measured, entries=entries, correction=Correction())
