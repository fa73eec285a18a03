"""The U-Net of 17 million parameters in the publication of IPAD."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UNet"]


def double(inputs: int, outputs: int, between: int | None = None) -> nn.Sequential:
    """Return two 3x3 convolutions, each followed by batch norm and ReLU.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        between: number of channels between the convolutions; None: ``outputs``.
    """
    middle = between or outputs
    layers: list[nn.Module] = []
    for a, b in ((inputs, middle), (middle, outputs)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net: an encoder with max pooling, a bilinear decoder, and skip connections by concatenation.

    Ronneberger et al. (MICCAI 2015), with two usual changes: convolutions are padded and followed by batch norm, and
    the lowest level has half as many channels, because bilinear upsampling, unlike a transposed convolution, does not
    halve them. 17.27 M parameters with one input channel and four classes; 155.93 GMAC at 1x640x400.

    Args:
        in_channels: number of channels of the image.
        classes: number of logits per pixel.
        width: number of channels at full resolution; doubled three times.

    Example:
        >>> net = UNet(width=4)
        >>> net(torch.zeros(1, 1, 32, 48)).shape
        torch.Size([1, 4, 32, 48])
    """

    def __init__(self, in_channels: int = 1, classes: int = 4, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.down = nn.ModuleList(
            double(a, b) for a, b in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            double(2 * w, max(w // 2, width), w) for w in (8 * width, 4 * width, 2 * width, width)
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes, h, w)`` for images ``(n, in_channels, h, w)``; h and w at least 16."""
        skips = []
        for depth, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if depth else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
            x = block(torch.cat([skip, x], 1))
        return self.head(x)
