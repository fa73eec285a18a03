"""The data and dense networks of ``python -m benchmarks.criteria``: brain slices (U-Net) and digits (ResNet)."""

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
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_prune.cli.config import conf_dir
from lightning_prune.segmentation.module import SegmentationModule

__all__ = ["TASKS", "Task", "trained"]

LR = 1e-3
DENSE_EPOCHS = {"brain": 24, "digits": 40}
SMALL = ["data.slices_per_axis=6", "data.size=32"]


@dataclass(frozen=True)
class Task:
    """What is learnt: a module with freshly initialised weights, its loaders, and the score that counts."""

    name: str
    module: L.LightningModule
    train: DataLoader[Any]
    test: DataLoader[Any]
    score: str

    @property
    def net(self) -> nn.Module:
        """What is pruned."""
        return self.module.get_submodule("net")

    @property
    def outputs(self) -> list[str]:
        """Layers that give the logits, for libraries that do not find them by themselves."""
        layers = [name for name, part in self.net.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
        return layers[-1:]


class Classifier(L.LightningModule):
    """Cross-entropy and accuracy."""

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
    """Seven classes on 64x64 slices, as ``experiment=study``."""
    given = ["experiment=study", "logger=none", f"seed={seed}", *(SMALL if small else ())]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=given)
    L.seed_everything(seed, workers=True, verbose=False)
    module: SegmentationModule = instantiate(config.module, _convert_="all")
    data = instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return Task("brain", module, data.train_dataloader(), data.test_dataloader(), "test/miou")


def digits(seed: int, small: bool) -> Task:
    """The 1,797 digits of scikit-learn, 8x8; two fifths of them for the test, the same for every seed."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    number = range(200 if small else len(labels))
    train, test = train_test_split(number, test_size=0.4, stratify=labels[: len(number)], random_state=0)
    L.seed_everything(seed, workers=True, verbose=False)
    net = ResNet(BasicBlock, (1, 1, 1, 1), 10, 1, channels=(32, 64, 128, 128), zero_init_last=False)
    net.conv1, net.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    module = Classifier(net)
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    held = TensorDataset(images, torch.from_numpy(labels))
    loaders = [DataLoader(torch.utils.data.Subset(held, part), 64, shuffle=part is train, drop_last=part is train)
               for part in (train, test)]  # fmt: skip
    return Task("digits", module, *loaders, "test/accuracy")


TASKS = {"brain": brain, "digits": digits}


def fit(task: Task, epochs: int, callbacks: list[L.Callback], lr: float = LR) -> None:
    """Train with Adam afresh, from ``lr`` down a cosine to zero: the same for every method and every stage."""
    task.module.configure_optimizers = lambda: optimizers(task.module, epochs, lr)  # type: ignore[method-assign]
    task.module.train()  # torch-pruning leaves the network in eval mode, and Lightning trains it as it is
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
    (found,) = trainer().test(task.module, task.test, verbose=False)
    return float(found[task.score])


def trained(name: str, seed: int, folder: Path, small: bool) -> Task:
    """The task with its dense network trained to its end: once, the weights are kept in ``folder``."""
    task = TASKS[name](seed, small)
    path = folder / f"{name}-{seed}{'-small' * small}.pt"
    if not path.is_file():
        fit(task, 2 if small else DENSE_EPOCHS[name], [])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(task.net.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    task.net.load_state_dict(torch.load(path))
    return task
