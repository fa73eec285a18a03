"""The three tasks: data, dense network, sizes of the training; dense networks are trained once and kept."""

from __future__ import annotations

import copy
import fcntl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from benchmarks.quality.data import Data, Part, brain, fashion, scenes
from benchmarks.quality.resnet import ResNet
from benchmarks.quality.training import confusion, fit, recalibrate
from lightning_prune.segmentation.networks import UNet
from lightning_prune.utils.atomic import atomic_write

__all__ = ["FOLDER", "SIZES", "TASKS", "Score", "Size", "Task", "dense", "make_task", "score"]

FOLDER = Path(__file__).parents[2] / "outputs" / "quality"
DENSE_RATE, STAGE_RATES = 2e-3, (1e-3, 2e-3, 4e-3, 4e-3)  # the smaller the network, the higher
#: task -> rates of networks from scratch, where those of the stages are too low: on validation (26 %, seed 1) the
#: thin network of the scenes has 0.36 with 2e-3, 0.50 with 4e-3 and 0.60 with 8e-3
SCRATCH_RATES = {"scenes": (8e-3, 8e-3, 8e-3, 8e-3)}


@dataclass(frozen=True)
class Task:
    """One task at one size.

    Attributes:
        name: of the task and of its size, for file names.
        build: ``depth -> network`` with new weights; depth 0 is the dense network, 1 a shallower one.
        data: the samples, on the device.
        classes: number of classes.
        dense_steps: steps of the training of the dense network.
        stage_steps: steps after each cut; more where the network is smaller, and a step cheaper.
        batch: size of a batch.
        calibration: number of images for the statistics of criteria and for the repair.
        after_cut: number of images of each set that are scored directly after a cut.
    """

    name: str
    build: Callable[[int], nn.Module]
    data: Data
    classes: int
    dense_steps: int
    stage_steps: tuple[int, ...]
    batch: int
    calibration: int
    after_cut: int

    @property
    def scratch_rates(self) -> tuple[float, ...]:
        """Learning rates of networks from scratch, by stage."""
        return SCRATCH_RATES.get(self.name.split("-")[0], STAGE_RATES)

    @property
    def segments(self) -> bool:
        """Whether targets are masks."""
        return self.data.train.targets.dim() == 3

    @property
    def example(self) -> Tensor:
        """An input of one image."""
        return self.data.train.images[:1]

    def calibration_batches(self, batch: int = 32) -> list[tuple[Tensor, Tensor]]:
        """Return the first training images, in batches."""
        part = self.data.train.first(self.calibration)
        return list(zip(part.images.split(batch), part.targets.split(batch), strict=True))


def unet(depth: int) -> nn.Module:
    """Return the U-Net of the scenes; the shallower one has half of the levels."""
    return UNet(1, 6, width=12) if depth == 0 else _smp("resnet18", 2, 6, (32, 16))


def resnet(depth: int) -> nn.Module:
    """Return ResNet-20, or ResNet-8."""
    return ResNet(3 if depth == 0 else 1)


def brain_unet(depth: int) -> nn.Module:
    """Return a U-Net with the first stages of ResNet-18; the shallower one has half of the levels."""
    return _smp("resnet18", 4, 3, (128, 64, 32, 16)) if depth == 0 else _smp("resnet18", 2, 3, (32, 16))


def _smp(encoder: str, depth: int, classes: int, decoder: tuple[int, ...]) -> nn.Module:
    options: dict[str, Any] = {"encoder_depth": depth, "decoder_channels": decoder, "in_channels": 1}
    return smp.Unet(encoder, encoder_weights=None, classes=classes, **options)


@dataclass(frozen=True)
class Size:
    """Data and length of the training of one task, see :class:`Task`."""

    data: Callable[[], Data]
    dense_steps: int
    stage_steps: tuple[int, ...]
    batch: int


#: task -> size of the runs. "study" is for two cores, "long" trains longer, "small" is for tests, "larger" for a GPU.
SIZES: dict[str, dict[str, Size]] = {
    "scenes": {
        "study": Size(partial(scenes, 6000, 400, 1000), 1000, (60, 100, 200, 200), 16),
        "long": Size(partial(scenes, 6000, 400, 1000), 1500, (300, 500, 800, 800), 16),
        "small": Size(partial(scenes, 64, 32, 32), 4, (2, 2, 2, 2), 8),
        "larger": Size(partial(scenes, 60000, 2000, 5000), 8000, (1000, 1500, 3000, 3000), 32),
    },
    "fashion": {
        "study": Size(partial(fashion, 12000, 2000, 5000, 2), 1000, (60, 100, 150, 150), 64),
        "long": Size(partial(fashion, 12000, 2000, 5000, 2), 1500, (300, 500, 800, 800), 64),
        "small": Size(partial(fashion, 128, 64, 64, 2), 4, (2, 2, 2, 2), 16),
        "larger": Size(partial(fashion, 50000, 10000, 10000, 1), 12000, (2000, 3000, 4000, 4000), 128),
    },
    "brain": {
        "study": Size(partial(brain, 130, 48), 400, (40, 60, 100, 100), 8),
        "long": Size(partial(brain, 130, 48), 1000, (200, 300, 500, 500), 8),
        "small": Size(partial(brain, 20, 32), 4, (2, 2, 2, 2), 4),
        "larger": Size(partial(brain, 130, 96), 4000, (800, 1000, 1500, 1500), 16),
    },
}
NETWORKS = {"scenes": unet, "fashion": resnet, "brain": brain_unet}
CLASSES = {"scenes": 6, "fashion": 10, "brain": 3}
CALIBRATION = {"scenes": 32, "fashion": 256, "brain": 32}
AFTER_CUT = {"scenes": 300, "fashion": 2000, "brain": 100}
TASKS = tuple(SIZES)


def make_task(name: str, size: str = "study", device: str = "cpu") -> Task:
    """Return a task.

    Args:
        name: one of ``TASKS``.
        size: ``"study"``, ``"long"``, ``"small"`` or ``"larger"``.
        device: that holds the data.
    """
    chosen = SIZES[name][size]
    return Task(
        name if size == "study" else f"{name}-{size}",
        NETWORKS[name],
        chosen.data().to(device),
        CLASSES[name],
        chosen.dense_steps,
        chosen.stage_steps,
        chosen.batch,
        CALIBRATION[name],
        AFTER_CUT[name],
    )


@dataclass(frozen=True)
class Score:
    """Score of a network on a set.

    Attributes:
        value: mean IoU over the classes, or accuracy.
        classes: IoU, or recall, of each class.
    """

    value: float
    classes: list[float]


def score(net: nn.Module, task: Task, part: Part) -> Score:
    """Return the score of a network on samples."""
    counts = confusion(net, part, task.classes).double()
    hits, truth = counts.diagonal(), counts.sum(1)
    union = truth + counts.sum(0) - hits if task.segments else truth
    by_class = hits / union.clamp(min=1)
    value = by_class.mean() if task.segments else hits.sum() / truth.sum()
    return Score(round(float(value), 5), [round(float(x), 4) for x in by_class])


def dense(task: Task, seed: int, folder: Path = FOLDER) -> nn.Module:
    """Return the trained dense network; it is trained at the first call and kept in ``folder``.

    A second process that asks for the same network waits for the first.

    Args:
        task: the task; the network is on the device of its data.
        seed: of the weights and of the order of the samples.
        folder: of the kept networks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}-{seed}.pt"
    torch.manual_seed(seed)
    net = task.build(0).to(task.example.device).to(memory_format=torch.channels_last)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            _train(net, task, seed, path)
    net.load_state_dict(torch.load(path, map_location=task.example.device))
    return copy.deepcopy(net)


def _train(net: nn.Module, task: Task, seed: int, path: Path) -> None:
    """Train the dense network and write its weights."""
    fit(net, task.data.train, task.dense_steps, task.batch, DENSE_RATE, seed)
    recalibrate(net, task.data.train, task.batch)
    with atomic_write(path) as temporary:
        torch.save(net.state_dict(), temporary)
