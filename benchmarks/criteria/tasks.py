"""Data and dense networks of ``python -m benchmarks.criteria``: brain slices (U-Net) and digits (ResNet)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_prune.cli.config import conf_dir
from lightning_prune.segmentation.module import SegmentationModule

__all__ = ["TASKS", "Task", "trained"]

LR = 1e-3
DENSE_EPOCHS = {"brain": 24, "digits": 40}
SMALL = ["data.slices_per_axis=6", "data.size=32"]


@dataclass(frozen=True)
class Task:
    """A module with newly initialised weights, its data loaders, and the name of its score."""

    name: str
    module: L.LightningModule
    train: DataLoader[Any]
    test: DataLoader[Any]
    score: str

    @property
    def net(self) -> nn.Module:
        """Return the network within the module, which is pruned."""
        return self.module.get_submodule("net")

    @property
    def outputs(self) -> list[str]:
        """Return the layers of the logits, for libraries that must be given them."""
        layers = [name for name, part in self.net.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
        return layers[-1:]


class Classifier(L.LightningModule):
    """Classifier with cross-entropy loss and accuracy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        accuracy = multiclass_accuracy(logits, batch[1], logits.shape[1], average="micro")
        self.log("test/accuracy", accuracy, on_epoch=True, batch_size=len(logits))


def brain(seed: int, small: bool) -> Task:
    """Return the task of ``experiment=study``: seven classes on brain slices of 64x64."""
    overrides = ["experiment=study", "logger=none", f"seed={seed}", *(SMALL if small else ())]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=overrides)
    L.seed_everything(seed, workers=True, verbose=False)
    module: SegmentationModule = instantiate(config.module, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return Task("brain", module, data.train_dataloader(), data.test_dataloader(), "test/miou")


def digits(seed: int, small: bool) -> Task:
    """Return the task of the 1,797 digits of scikit-learn, 8x8.

    Two fifths of them are the test set, the same for all seeds.
    """
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    indices = range(200 if small else len(labels))
    train, test = train_test_split(indices, test_size=0.4, stratify=labels[: len(indices)], random_state=0)
    L.seed_everything(seed, workers=True, verbose=False)
    net = ResNet(BasicBlock, (1, 1, 1, 1), 10, 1, channels=(32, 64, 128, 128), zero_init_last=False)
    net.conv1, net.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    module = Classifier(net)
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    dataset = TensorDataset(images, torch.from_numpy(labels))
    train_loader = DataLoader(Subset(dataset, train), 64, shuffle=True, drop_last=True)
    return Task("digits", module, train_loader, DataLoader(Subset(dataset, test), 64), "test/accuracy")


TASKS = {"brain": brain, "digits": digits}


def fit(task: Task, epochs: int, callbacks: list[L.Callback], lr: float = LR) -> None:
    """Train with a new Adam, its learning rate falling from ``lr`` to zero along a cosine."""
    task.module.configure_optimizers = lambda: optimizers(task.module, epochs, lr)  # type: ignore[method-assign]
    task.module.train()  # torch-pruning leaves it in eval mode, which Lightning does not change
    trainer(epochs, callbacks).fit(task.module, task.train)


def optimizers(module: L.LightningModule, epochs: int, lr: float) -> dict[str, Any]:
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(epochs: int = 0, callbacks: list[L.Callback] | None = None) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def score(task: Task) -> float:
    (metrics,) = trainer().test(task.module, task.test, verbose=False)
    return float(metrics[task.score])


def trained(name: str, seed: int, folder: Path, small: bool) -> Task:
    """Return the task with its trained dense network; the weights are kept in ``folder`` and trained only once."""
    task = TASKS[name](seed, small)
    path = folder / f"{name}-{seed}{'-small' * small}.pt"
    if not path.is_file():
        fit(task, 2 if small else DENSE_EPOCHS[name], [])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(task.net.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    task.net.load_state_dict(torch.load(path))
    return task
