"""Networks of ``python -m benchmarks.quality.one_cut``: those of the quality study, and three more classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.quality.resnet import ResNet
from benchmarks.quality.tasks import Task, make_task

__all__ = ["NETWORKS", "Network", "task_of"]


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection of MobileNetV2 (Sandler et al., 2018)."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        self.adds = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(n, width, h / stride, w / stride)``."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


def mobilenet() -> nn.Module:
    """Return a small MobileNetV2: seven inverted residuals of 16 to 64 channels."""
    shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 64, 1), (64, 64, 1)]
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    head = [nn.Conv2d(64, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6()]
    blocks = [InvertedResidual(*shape) for shape in shapes]
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10))


def vit() -> nn.Module:
    """Return a vision transformer of timm: 49 patches of 2x2, four blocks of width 64."""
    return VisionTransformer(14, 2, 1, 10, embed_dim=64, depth=4, num_heads=4)


def group_norm_resnet() -> nn.Module:
    """Return ResNet-14 with a group norm of four groups in place of each batch norm."""
    net = ResNet(2)
    for parent in list(net.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(4, norm.num_features))
    return net


@dataclass(frozen=True)
class Network:
    """A network of this benchmark.

    Attributes:
        task: of ``benchmarks.quality.tasks`` that it learns.
        build: the network with new weights; None: the dense network of that task.
        steps: of its training, if it is not that task's.
    """

    task: str
    build: Callable[[], nn.Module] | None = None
    steps: int = 0


NETWORKS = {
    "ResNet-20": Network("fashion"),
    "ResNet-14, group norms": Network("fashion", group_norm_resnet, 700),
    "MobileNetV2-like": Network("fashion", mobilenet, 700),
    "ViT": Network("fashion", vit, 600),
    "U-Net, scenes": Network("scenes"),
    "U-Net, brain slices": Network("brain"),
}


CLASSIFIED_IMAGES = 512  # that criteria, recalibration and repair of classifiers see


def task_of(name: str, size: str) -> Task:
    """Return the task of a network, in a size of ``benchmarks.quality.tasks``."""
    network = NETWORKS[name]
    task, build = make_task(network.task, size), network.build
    if not task.segments and size == "study":
        task = replace(task, calibration=CLASSIFIED_IMAGES)
    if build is None:
        return task
    steps = network.steps if size == "study" else task.dense_steps
    file_name = f"{name.split(',')[0].lower()}-{task.name}"
    return replace(task, name=file_name, build=lambda depth: build(), dense_steps=steps)
