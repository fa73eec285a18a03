"""A mobile network of parallel branches, which may vanish (level 0)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AtomMobile", "Block", "Branch"]

#: channels, blocks and first stride of each stage
STAGES = ((16, 1, 1), (24, 2, 2), (40, 2, 2), (80, 2, 2))


def layer(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, norm and ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class Branch(nn.Module):
    """Expand by a convolution of one element, then a depthwise one with a kernel of its own."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = layer(inputs, width)
        self.depthwise = layer(width, width, kernel, stride, groups=width)

    @property
    def alive(self) -> bool:
        """Whether a channel is left."""
        return self.expand[0].get_parameter("weight").numel() > 0

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` to ``(n, width, h, w)``, smaller by the stride."""
        return self.depthwise(self.expand(x))


class Block(nn.Module):
    """An inverted residual with a branch for each kernel; those that have lost their last channel are left out."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernels: Sequence[int], width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(inputs, width, kernel, stride) for kernel in kernels)
        self.project = nn.Conv2d(len(kernels) * width, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    @property
    def optional_parts(self) -> list[nn.Module]:
        """All but one of them may vanish."""
        return list(self.branches)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` to ``(n, outputs, h, w)``, smaller by the stride."""
        atoms = torch.cat([branch(x) for branch in self.branches if branch.alive], 1)
        out = self.norm(self.project(atoms))
        return x + out if self.residual else out


class AtomMobile(nn.Module):
    """Inverted residuals whose channels, and whole branches, are for a penalty to choose (after AtomNAS).

    AtomNAS (Mei et al., ICLR 2020) starts from MobileNetV2 with depthwise kernels of 3, 5 and 7 beside each other in
    every block and lets network slimming decide. Here with a light decoder for segmentation: each scale's features
    are brought to ``decoder`` channels and added up, from the coarsest to the finest.

    Args:
        in_channels: of the image.
        classes: number of logits per pixel.
        width: multiplies the channels of every stage.
        expansion: channels inside a block as a multiple of what it gets, over all branches together.
        kernels: of the branches.
        decoder: channels of the decoder.

    Raises:
        ValueError: kernels are not odd, or there are none; the width leaves no channels.

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
        for channels, number, stride in STAGES:
            blocks = []
            for index in range(number):
                outputs = round(channels * width)
                inside = max(inputs * expansion // len(kernels), 1)
                blocks.append(Block(inputs, outputs, stride if index == 0 else 1, kernels, inside))
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))
            self.laterals.append(layer(inputs, decoder))
        self.refine = layer(decoder, decoder, 3, groups=decoder)
        self.head = nn.Conv2d(decoder, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes, h, w)`` for images ``(n, in_channels, h, w)``; h and w at least 16."""
        features, out = [], self.stem(x)
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            out = stage(out)
            features.append(lateral(out))
        found = features.pop()
        while features:
            finer = features.pop()
            found = finer + F.interpolate(found, size=finer.shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(
            self.head(self.refine(found)), size=x.shape[2:], mode="bilinear", align_corners=False
        )
