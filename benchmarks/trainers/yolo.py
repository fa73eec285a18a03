"""Prune YOLO in Ultralytics' own training, by its callbacks; that package (AGPL) is no part of this one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

from lightning_prune import Pruner

__all__ = ["NETWORKS", "prune_in_training", "write_data"]

#: network -> whether it segments
NETWORKS = {"yolov8n": False, "yolo11n": False, "yolo11n-seg": True}
SIZE = 128  # pixels


def write_data(folder: Path, segment: bool, images: tuple[int, int] = (16, 4)) -> Path:
    """Write discs and bars as a data set in the format of coco8, and return its YAML file.

    Args:
        folder: to write to.
        segment: write outlines, else boxes.
        images: number of images for training and validation.
    """
    generator = np.random.default_rng(0)
    for part, number in zip(("train", "val"), images, strict=True):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            image, labels = _drawing(generator, segment)
            image.save(folder / "images" / part / f"{index}.png")
            (folder / "labels" / part / f"{index}.txt").write_text("\n".join(labels) + "\n")
    path = folder / "data.yaml"
    names = {0: "disc", 1: "bar"}
    path.write_text(
        yaml.safe_dump(
            {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": names}
        )
    )
    return path


def _drawing(generator: np.random.Generator, segment: bool) -> tuple[Image.Image, list[str]]:
    """Return an image of three shapes, and a line for each: class, then outline or box in shares of the size."""
    image = Image.fromarray(generator.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8))
    draw, labels = ImageDraw.Draw(image), []
    for _ in range(3):
        kind, (x, y) = int(generator.integers(2)), generator.uniform(0.2, 0.8, 2)
        width, height = (0.12, 0.12) if kind == 0 else (0.3, 0.08)
        angles = (
            np.linspace(0, 2 * np.pi, 16, endpoint=False) if kind == 0 else np.pi * np.array([1, 3, 5, 7]) / 4
        )
        scale = 1 if kind == 0 else np.sqrt(2)
        outline = np.stack(
            [x + scale * width / 2 * np.cos(angles), y + scale * height / 2 * np.sin(angles)], 1
        )
        outline = outline.clip(0, 1)
        draw.polygon(
            [tuple(point * SIZE) for point in outline], fill=tuple(generator.integers(120, 255, 3).tolist())
        )
        low, high = outline.min(0), outline.max(0)
        box = [*((low + high) / 2), *(high - low)]
        labels.append(
            " ".join([str(kind), *(f"{value:.5f}" for value in (outline.ravel() if segment else box))])
        )
    return image, labels


def adapt(trainer: Any) -> None:
    """Update what depends on sizes, and what only this trainer knows."""
    from ultralytics.nn.modules import C2f

    trainer.ema._pairs = None  # references to the former data
    trainer.best_fitness = None  # of a larger network
    for network in (trainer.model, trainer.ema.ema):
        for module in network.modules():
            if isinstance(module, C2f):
                module.c = module.cv1.conv.out_channels // 2  # which only the export reads


def add_pruning(yolo: Any, share: float, amount: float) -> list[Pruner]:
    """Add the callbacks of ``docs/guides/trainers.md`` to a model of Ultralytics; return a list for its Pruner."""
    pruners: list[Pruner] = []

    def start(trainer: Any) -> None:
        size = trainer.args.imgsz
        pruners.append(
            Pruner(
                trainer.model,
                torch.zeros(1, 3, size, size, device=trainer.device),
                {"macs": share},
                amount={"macs": amount},
                batches=lambda: (trainer.preprocess_batch(batch)["img"] for batch in trainer.train_loader),
                copies=[trainer.ema.ema],
                on_cut=[lambda record: adapt(trainer)],
            )
        )

    def begin_batch(trainer: Any) -> None:
        trainer.batch_context = pruners[-1].observe()
        trainer.batch_context.__enter__()

    def end_batch(trainer: Any) -> None:
        trainer.batch_context.__exit__(None, None, None)

    def end_epoch(trainer: Any) -> None:
        pruners[-1].step(trainer.optimizer, trainer.epoch)

    yolo.add_callback("on_train_start", start)
    yolo.add_callback("on_train_batch_start", begin_batch)
    yolo.add_callback("on_train_batch_end", end_batch)
    yolo.add_callback("on_train_epoch_end", end_epoch)
    return pruners


def prune_in_training(name: str, folder: Path, epochs: int = 8, share: float = 0.5) -> dict[str, Any]:
    """Train a network from random weights, prune it on the way, export it, and load both files again."""
    from ultralytics import YOLO

    data, start = write_data(folder / "data" / name, NETWORKS[name]), time.perf_counter()
    yolo = YOLO(f"{name}.yaml")
    pruners = add_pruning(yolo, share, amount=0.25 * (1 - share) / 0.5)
    yolo.train(
        data=str(data),
        epochs=epochs,
        imgsz=SIZE,
        batch=4,
        workers=0,
        project=str(folder.resolve() / "runs"),
        name=name,
        device="cpu",
        plots=False,
        verbose=False,
        optimizer="AdamW",
        lr0=1e-3,
        amp=False,
    )
    pruner, seconds = pruners[-1], time.perf_counter() - start
    losses = _losses(Path(yolo.trainer.save_dir) / "results.csv")
    again = YOLO(yolo.trainer.last)
    images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    file = again.export(format="onnx", imgsz=SIZE, simplify=False)
    return {
        "network": name,
        "epochs": epochs,
        "cuts": [cut.epoch for cut in pruner.history],
        "macs_share": pruner.metrics["prune/macs_share"],
        "params_share": pruner.metrics["prune/params_share"],
        "finished": pruner.finished,
        "not_repaired": [cut.not_repaired for cut in pruner.history],
        "cut_seconds": [cut.seconds for cut in pruner.history],
        "seconds": seconds,
        "losses": losses,
        "average_follows": _average_distance(yolo.trainer),
        "same_after_loading": _same_parameters(again.model, pruner.record),
        "onnx_difference": _onnx_difference(again.model, file, images),
        "detections": len(
            YOLO(file, task=again.task).predict(np.zeros((SIZE, SIZE, 3), np.uint8), verbose=False)
        ),
    }


def _losses(path: Path) -> list[float]:
    """Return the sum of the training losses of each epoch."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    columns = [index for index, name in enumerate(rows[0]) if name.strip().startswith("train/")]
    return [sum(float(row[index]) for index in columns) for row in rows[1:]]


def _average_distance(trainer: Any) -> float:
    """Return the relative distance of the moving average from the network, which it follows closely at first."""
    network, average = (dict(module.named_parameters()) for module in (trainer.model, trainer.ema.ema))
    difference = sum(float((network[name] - average[name]).detach().square().sum()) for name in network)
    return (difference / sum(float(value.detach().square().sum()) for value in network.values())) ** 0.5


def _same_parameters(loaded: torch.nn.Module, record: Any) -> bool:
    """Return whether a loaded network has the sizes of the record."""
    shapes = {name: tensor.shape for name, tensor in loaded.state_dict().items()}
    return all(
        shapes[name][dim] == len(indices)
        for name, dims in record.kept.items()
        if name in shapes
        for dim, indices in dims.items()
    )


def _onnx_difference(network: torch.nn.Module, file: str, images: torch.Tensor) -> float:
    """Return the largest difference between the outputs of network and export, as a share of the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    exported = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        output = network.float().eval()(images)
    while isinstance(output, (tuple, list)):
        output = output[0]
    return float(np.abs(output.numpy() - exported).max() / np.abs(exported).max())
