"""The residual networks of CIFAR-10 (He et al., CVPR 2016), for images with one channel too.

Like ``lightning_prune.classification.CifarResNet``, which draws its weights otherwise: results of the study that are
stored need these.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ResNet"]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(n, outputs, h / stride, w / stride)``."""
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Three stages of ``blocks`` blocks with 16, 32 and 64 channels; ``6 * blocks + 2`` layers.

    Example:
        >>> import torch
        >>> ResNet(3)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, blocks: int = 3, width: int = 16, in_channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                Block(widths[stage] if block == 0 else widths[stage + 1], widths[stage + 1], stride)
                for stage in range(3)
                for block in range(blocks)
                for stride in [2 if stage and block == 0 else 1]
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes)`` for images ``(n, in_channels, h, w)``."""
        return self.head(self.stages(self.norm(self.conv(x)).relu()).mean((2, 3)))
