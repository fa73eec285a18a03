"""ImageFolder: layouts, class names, and what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_prune.classification import ClassificationModule
from lightning_prune.data import ImageFolder

RNG = np.random.default_rng(0)
NAMES = ("ant", "bee", "cat")


def images(root: Path, count: int = 6, names=NAMES, level: int = 80) -> Path:
    """Write grey images of unequal sizes, whose brightness is that of their class."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for n in range(count):
            pixels = np.full((8 + n, 12), level * number, dtype=np.uint8) + RNG.integers(
                0, 20, (8 + n, 12), np.uint8
            )
            Image.fromarray(pixels).save(root / name / f"{root.name}{n}.png")
    return root


def test_classes_are_the_folders_and_images_are_resized_and_normalised(tmp_path):
    data = ImageFolder(images(tmp_path), 3, size=(8, 8), channels=1, val=0.2, test=0.2)
    sizes = [len(data.samples(stage)) for stage in ("train", "val", "test")]
    assert (sizes, data.class_names) == ([10, 4, 4], NAMES)
    for image, label in data.samples("train"):
        assert image.shape == (1, 8, 8)
        assert ((image.mean() / 4 + 0.5) * 255 - 10) / 80 == pytest.approx(label.item(), abs=0.1)


def test_folders_of_stages(tmp_path):
    for stage, count in {"train": 4, "valid": 2, "test": 3}.items():
        images(tmp_path / stage, count)
    data = ImageFolder(tmp_path, size=(8, 8))
    assert [len(data.samples(stage)) for stage in ("train", "val", "test")] == [12, 6, 9]
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match=r"other classes: \['cat', 'dog'\] are in one only"):
        ImageFolder(tmp_path).setup()


def test_another_number_of_classes_names_the_folders(tmp_path):
    with pytest.raises(
        ValueError, match=r"3 class folders \(ant, bee, cat\), but num_classes=2.*task.num_classes=3"
    ):
        ImageFolder(images(tmp_path), 2).setup()


@pytest.mark.parametrize(("root", "message"), [("nowhere", "no folder .*nowhere"), (".", "has no folders")])
def test_missing_folders(tmp_path, root, message):
    with pytest.raises(FileNotFoundError, match=message):
        ImageFolder(tmp_path / root).setup()


def test_an_empty_class_is_an_error(tmp_path):
    (images(tmp_path) / "dog").mkdir()
    with pytest.raises(ValueError, match="dog has no images"):
        ImageFolder(tmp_path).setup()


def test_metrics_and_confusion_have_the_names_of_the_folders(tmp_path):
    data = ImageFolder(images(tmp_path), 3, size=(8, 8), channels=1, val=0.2, test=0.5, batch_size=4)
    module = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), num_classes=3)
    nn.init.zeros_(module.net[1].weight)
    with torch.no_grad():
        module.net[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # everything is a bee
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    (scores,) = trainer.test(module, data, verbose=False)
    counts = [sum(label == n for _, label in data.samples("test")).item() for n in range(3)]
    assert [scores[f"test/accuracy_{name}"] for name in NAMES] == [0, 1, 0]
    assert module.confusion.tolist() == [[0, counts[0], 0], [0, counts[1], 0], [0, counts[2], 0]]
