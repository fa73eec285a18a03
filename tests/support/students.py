"""Small students, teachers and trainers for the tests of distillation."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback
from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.mixin import DistillationMixin

QUIET = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher is worse than its student"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
ALL_LOSSES = {"alpha": 1.0, "beta": 1.0, "lambda_": 1.0}


def small_net(classes: int = 3, width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, classes, 1),
    )


class PlainModule(L.LightningModule):
    """A module without distillation; keeps the loss of every training batch in ``totals``."""

    lr = 1e-2

    def __init__(self, net: nn.Module | None = None, example: bool = True) -> None:
        super().__init__()
        self.net = net or small_net()
        self.totals: list[float] = []
        if example:
            self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: Any, index: int) -> Tensor:
        image, mask = batch
        return F.cross_entropy(self(image), mask)

    def validation_step(self, batch: Any, index: int) -> None:
        image, mask = batch
        self.log("val/loss", F.cross_entropy(self(image), mask))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.totals.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


class Student(DistillationMixin, PlainModule):
    """The same module with distillation."""


def data(number: int = 16, size: int = 8, channels: int = 1, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(number, channels, size, size, generator=generator)
    mask = (3 * image.mean(1)).long().clamp(max=2)
    return DataLoader(TensorDataset(image, mask), 8, shuffle=shuffle)


def trainer(*callbacks: L.Callback, epochs: int = 3, **kwargs: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **{**quiet, **kwargs})


def pruning(submodule: str | None = "net", **kwargs: Any) -> FilterPruningCallback:
    defaults = {"budget": {"macs": 0.5}, "amount": {"macs": 0.3}, "start_epoch": 0, "verbose": False}
    return FilterPruningCallback(submodule=submodule, **{**defaults, **kwargs})


def student(distillation: Distillation, **kwargs: Any) -> Student:
    module = Student(**kwargs)
    module.distillation = distillation
    return module


class AfterEachBatch(L.Callback):
    """Calls a function with trainer, module and outputs after each training batch."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.function(trainer, pl_module, outputs)
