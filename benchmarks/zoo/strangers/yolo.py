"""Ultralytics' networks, built by the installed package from its own descriptions; nothing of it is copied here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.zoo.strangers.case import Case, images

__all__ = ["cases"]

#: description -> class of ultralytics.nn.tasks
NETWORKS = {
    "yolov3-tiny": "DetectionModel",
    "yolov5n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov9t": "DetectionModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo12n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolo11n-pose": "PoseModel",
    "yolo11n-cls": "ClassificationModel",
}


def cases() -> Iterator[Case]:
    """Yield the networks of Ultralytics."""
    for name, kind in NETWORKS.items():
        yield Case(
            f"ultralytics/{name}", "ultralytics", partial(_yolo, name, kind), images(3, 64, 64), _floats
        )


def _yolo(name: str, kind: str) -> nn.Module:
    from ultralytics.nn import tasks

    network: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    return network


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
