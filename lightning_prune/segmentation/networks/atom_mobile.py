"""AtomMobile: a mobile network with parallel branches that pruning may remove."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AtomMobile", "Block", "Branch"]

#: Channels, number of blocks and stride of the first block, of each stage.
STAGES = ((16, 1, 1), (24, 2, 2), (40, 2, 2), (80, 2, 2))


def layer(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias, followed by batch norm and ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class Branch(nn.Module):
    """Expansion by a 1x1 convolution, then a depthwise convolution."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = layer(inputs, width)
        self.depthwise = layer(width, width, kernel, stride, groups=width)

    @property
    def alive(self) -> bool:
        """Whether the branch has channels left."""
        return self.expand[0].get_parameter("weight").numel() > 0

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, width, h / stride, w / stride)``."""
        return self.depthwise(self.expand(x))


class Block(nn.Module):
    """Inverted residual block with one branch per kernel size; branches without channels are skipped."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernels: Sequence[int], width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(inputs, width, kernel, stride) for kernel in kernels)
        self.project = nn.Conv2d(len(kernels) * width, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    @property
    def optional_parts(self) -> list[nn.Module]:
        """The branches; pruning may remove all but one of them."""
        return list(self.branches)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        atoms = torch.cat([branch(x) for branch in self.branches if branch.alive], 1)
        out = self.norm(self.project(atoms))
        return x + out if self.residual else out


class AtomMobile(nn.Module):
    """Network of inverted residual blocks whose channels and branches a penalty selects (after AtomNAS).

    AtomNAS (Mei et al., ICLR 2020) is MobileNetV2 with parallel depthwise convolutions of the kernel sizes 3, 5 and 7
    in every block, from which network slimming selects. The decoder for segmentation maps the features of each
    resolution to ``decoder`` channels and adds them up, from the coarsest to the finest.

    Args:
        in_channels: number of channels of the image.
        classes: number of logits per pixel.
        width: factor of the channels of every stage.
        expansion: channels inside a block, over all branches, as a multiple of its input channels.
        kernels: kernel sizes of the branches.
        decoder: number of channels of the decoder.

    Raises:
        ValueError: there are no kernels or an even one, or the width leaves no channels.

    Example:
        >>> net = AtomMobile(width=0.5)
        >>> net(torch.zeros(1, 1, 32, 48)).shape
        torch.Size([1, 4, 32, 48])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 4,
        width: float = 1.0,
        expansion: int = 6,
        kernels: Sequence[int] = (3, 5, 7),
        decoder: int = 32,
    ) -> None:
        super().__init__()
        inputs = round(16 * width)
        if not kernels or not all(kernel % 2 for kernel in kernels):
            raise ValueError(
                f"kernels must be odd numbers, at least one, so that branches fit; got {kernels}"
            )
        if inputs < 1:
            raise ValueError(f"width={width} leaves no channels; the stem has 16 times as many")
        self.stem = layer(in_channels, inputs, 3, 2)
        self.stages, self.laterals = nn.ModuleList(), nn.ModuleList()
        for channels, block_count, stride in STAGES:
            blocks = []
            for index in range(block_count):
                outputs = round(channels * width)
                branch_width = max(inputs * expansion // len(kernels), 1)
                blocks.append(Block(inputs, outputs, stride if index == 0 else 1, kernels, branch_width))
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))
            self.laterals.append(layer(inputs, decoder))
        self.refine = layer(decoder, decoder, 3, groups=decoder)
        self.head = nn.Conv2d(decoder, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes, h, w)`` for images ``(n, in_channels, h, w)``; h and w at least 16."""
        features, out = [], self.stem(x)
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            out = stage(out)
            features.append(lateral(out))
        decoded = features.pop()
        while features:
            finer = features.pop()
            decoded = finer + F.interpolate(
                decoded, size=finer.shape[2:], mode="bilinear", align_corners=False
            )
        return F.interpolate(
            self.head(self.refine(decoded)), size=x.shape[2:], mode="bilinear", align_corners=False
        )
