"""The residual networks for images of 32 x 32 pixels (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.utils.arguments import check_choice

__all__ = ["CifarResNet", "cifar_resnet"]

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Option A: every second pixel in each direction, and zeros for the channels that are new; no parameters.

    Args:
        new_channels: number of channels to add, half of them on each side.
        stride: distance of the pixels.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(n, c + new_channels, h / stride, w / stride)``."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut that is added before the last ReLU.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        stride: stride of the first convolution.
        option: ``"A"`` or ``"B"``, the shortcut where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, option: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _shortcut(inputs, outputs, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(n, outputs, h / stride, w / stride)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int, option: Shortcut) -> nn.Module:
    if option == "A":
        return PaddedShortcut(outputs - inputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class CifarResNet(nn.Module):
    """Residual network for small images: a 3x3 stem, three stages of basic blocks, global average pooling.

    He et al., "Deep residual learning for image recognition", CVPR 2016: ``6 n + 2`` layers with weights, ``n``
    blocks a stage, widths 16, 32 and 64. ResNet-20 has 0.27 M parameters, ResNet-56 0.85 M and 126 M MACs with
    images of 3 x 32 x 32.

    Args:
        depth: ``6 n + 2``: 20, 32, 44, 56, 110, ...
        in_channels: number of channels of the image.
        num_classes: number of logits.
        width: number of channels of the first stage; doubled twice.
        shortcut: where the shape changes, ``"A"`` (subsampling and zeros, as published for CIFAR-10) or ``"B"`` (a
            1x1 convolution and batch norm, with which every channel can be removed on its own).

    Raises:
        ValueError: ``depth`` is not ``6 n + 2``, or the shortcut is unknown.

    Example:
        >>> import torch
        >>> net = CifarResNet(depth=8, in_channels=1, width=4)
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 20,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 16,
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        check_choice("shortcut", shortcut, ("A", "B"))
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: give 6 n + 2, such as 20, 32, 44 or 56")
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for n in range((depth - 2) // 6):
                outputs = width * 2**stage
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not n else 1, shortcut))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(n, num_classes)`` for images ``(n, in_channels, h, w)``."""
        features = self.blocks(F.relu(self.bn(self.conv(image))))
        return self.head(features.mean((2, 3)))


def _initialise(module: nn.Module) -> None:
    """Draw weights as He et al. (ICCV 2015)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)


def cifar_resnet(
    depth: int = 20,
    in_channels: int = 1,
    num_classes: int = 10,
    width: int = 16,
    shortcut: Shortcut = "B",
) -> CifarResNet:
    """Return a :class:`CifarResNet`; the arguments are its own.

    Example:
        >>> sum(p.numel() for p in cifar_resnet(56, in_channels=3, shortcut="A").parameters())
        853018
    """
    return CifarResNet(depth, in_channels, num_classes, width, shortcut)
