"""RITnet: a small densely connected U-Net that segments the parts of the eye."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RITnet"]


class Down(nn.Module):
    """Encoder block: pooling (except in the first block), three densely connected convolutions, batch norm."""

    def __init__(self, inputs: int, width: int, halve: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.squeeze2 = nn.Conv2d(inputs + width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.squeeze3 = nn.Conv2d(inputs + 2 * width, width, 1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, width, h, w)``, or to half of that size with pooling."""
        x = self.pool(x)
        x = torch.cat([x, F.leaky_relu(self.dropout(self.conv1(x)))], 1)
        x = torch.cat([x, F.leaky_relu(self.dropout(self.conv2(self.squeeze2(x))))], 1)
        return self.norm(F.leaky_relu(self.dropout(self.conv3(self.squeeze3(x)))))


class Up(nn.Module):
    """Decoder block: upsampling, concatenation with the skip connection, two densely connected convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze1 = nn.Conv2d(2 * width, width, 1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.squeeze2 = nn.Conv2d(3 * width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map features ``(n, width, h', w')`` and a skip connection ``(n, width, h, w)`` to ``(n, width, h, w)``."""
        x = torch.cat([F.interpolate(x, size=skip.shape[2:], mode="nearest"), skip], 1)
        x = torch.cat([x, F.leaky_relu(self.dropout(self.conv1(self.squeeze1(x))))], 1)
        return F.leaky_relu(self.dropout(self.conv2(self.squeeze2(x))))


class RITnet(nn.Module):
    """RITnet (Chaudhary et al., ICCV Workshops 2019): five encoder and four decoder blocks of 32 channels.

    248,900 parameters with one input channel and four classes; 16.42 GMAC at 1x640x400.

    Args:
        in_channels: number of channels of the image.
        classes: number of logits per pixel.
        width: number of channels of every block.

    Example:
        >>> net = RITnet()
        >>> sum(parameter.numel() for parameter in net.parameters())
        248900
        >>> net(torch.zeros(1, 1, 32, 48)).shape
        torch.Size([1, 4, 32, 48])
    """

    def __init__(self, in_channels: int = 1, classes: int = 4, width: int = 32) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            Down(width if depth else in_channels, width, depth > 0) for depth in range(5)
        )
        self.up = nn.ModuleList(Up(width) for _ in range(4))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes, h, w)`` for images ``(n, in_channels, h, w)``; h and w at least 16."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(x, skips.pop())
        return self.head(x)
