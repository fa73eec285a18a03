"""A U-Net of a few thousand parameters, for summaries and pictures."""

from __future__ import annotations

import torch
from torch import nn


class SmallUNet(nn.Module):
    """An encoder of three resolutions with a residual block in each, and a decoder with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in ((1, 8), (8, 12), (12, 16))])
        self.body = nn.ModuleList([nn.Conv2d(c, c, 3, 1, 1) for c in (8, 12, 16)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(c) for c in (8, 12, 16)])
        self.up = nn.ModuleList([nn.Conv2d(16 + 12, 12, 3, 1, 1), nn.Conv2d(12 + 8, 8, 3, 1, 1)])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down, body, norm in zip(self.down, self.body, self.norm, strict=True):
            x = down(x)
            x = x + norm(body(x))
            skips.append(x)
        for conv, skip in zip(self.up, skips[-2::-1], strict=True):
            x = conv(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skip], 1))
        return self.head(x)
