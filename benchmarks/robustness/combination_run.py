"""One short pruning run in one combination of settings, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback

__all__ = ["CUTS", "EPOCHS", "OPTIMIZERS", "PRECISIONS", "Combination", "Outcome", "run"]

EPOCHS, CUTS = 14, (2, 5)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9),
    "Adam": partial(optim.Adam, lr=3e-3),
    "AdamW amsgrad": partial(optim.AdamW, lr=3e-3, amsgrad=True),
    "AdamW fused": partial(optim.AdamW, lr=3e-3, fused=True),
    "NAdam": partial(optim.NAdam, lr=3e-3),
    "RAdam": partial(optim.RAdam, lr=2e-2),
    "RMSprop centered": partial(optim.RMSprop, lr=2e-3, centered=True, momentum=0.5),
    "Adagrad": partial(optim.Adagrad, lr=2e-2),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "Adafactor": partial(optim.Adafactor, lr=3e-2),
}


@dataclass(frozen=True)
class Combination:
    """One row of the table."""

    optimizer: str = "AdamW fused"
    state: str = "carry"
    precision: str = "32-true"
    compiled: bool = False
    accumulate: int = 1
    averaged: bool = False
    processes: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of it: what is wrong (nothing, if all is well), and the loss before and after."""

    wrong: list[str]
    losses: list[float]
    shares: list[float]


class Tiny(L.LightningModule):
    """A classifier of stripes, and its mean loss in every epoch."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 4),
        )
        self.losses: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        """A new row of losses."""
        self.losses.append([])

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses[-1].append(loss.item())
        return loss

    def configure_optimizers(self) -> optim.Optimizer:
        """As the combination says."""
        return OPTIMIZERS[self.optimizer](self.parameters())


class Inspector(L.Callback):
    """Looks at parameters and state at the end of each epoch, before the cut."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the parameters."""
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold them against what they are now."""
        epoch = trainer.current_epoch
        still = [name for name, p in pl_module.named_parameters() if torch.equal(p, self.before[name])]
        self.wrong += [f"epoch {epoch}: {name} did not move" for name in still]
        names = {p: name for name, p in pl_module.named_parameters()}
        for parameter, state in trainer.optimizers[0].state.items():
            shapes = {tuple(value.shape) for value in state.values() if isinstance(value, Tensor)}
            strange = shapes - _fitting(parameter)
            self.wrong += [f"epoch {epoch}: state of {names[parameter]} has shape {s}" for s in strange]


def _fitting(parameter: Tensor) -> set[tuple[int, ...]]:
    """The shapes that state may have: the parameter's, none, and a row or column of it (Adafactor)."""
    shape = tuple(parameter.shape)
    row, column = (*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])
    return {shape, (), *({row, column} if len(shape) > 1 else ())}


def data(processes: int) -> DataLoader:
    """Stripes in noise; each process sees the same number of batches."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    stripes = torch.stack([(torch.arange(144) % (n + 2) == 0).float().reshape(1, 12, 12) for n in range(4)])
    x = stripes[y] + 0.7 * torch.randn(96, 1, 12, 12, generator=generator)
    return DataLoader(TensorDataset(x, y), 16 // processes)


def run(combination: Combination, backend: str = "aot_eager") -> Outcome:
    """Train and prune once."""
    torch.compiler.reset()
    module, inspector = Tiny(combination.optimizer), Inspector()
    if combination.compiled:
        module.net.compile(backend=backend)
    pruning = FilterPruningCallback(
        {"macs": 0.5},
        amount={"macs": 0.25},
        start_epoch=CUTS[0],
        every_n_epochs=CUTS[1] - CUTS[0],
        optimizer=combination.state,  # type: ignore[arg-type]
        verbose=False,
    )
    averaging = [EMAWeightAveraging(decay=0.9)] if combination.averaged else []
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="gpu" if combination.precision == "16-mixed" else "cpu",
        devices=combination.processes,
        strategy="ddp" if combination.processes > 1 else "auto",
        precision=combination.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=combination.accumulate,
        callbacks=[inspector, pruning, *averaging],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(combination.processes))
    wrong = [
        *inspector.wrong,
        *_cuts(pruning),
        *_losses(module),
        *_averages(averaging, module),
        *_ranks(module),
    ]
    losses = [sum(epoch) / len(epoch) for epoch in module.losses]
    return Outcome(wrong, losses, [cut.share["macs"] for cut in pruning.history])


def _cuts(pruning: FilterPruningCallback) -> list[str]:
    found = tuple(cut.epoch for cut in pruning.history)
    return [] if found == CUTS else [f"cuts at the end of epochs {found}, not {CUTS}"]


def _losses(module: Tiny) -> list[str]:
    """After a cut the loss falls until the next one, and it ends below where the last cut found it."""
    means = [sum(epoch) / len(epoch) for epoch in module.losses]
    ends = (0, *(epoch + 1 for epoch in CUTS), len(means))
    parts = [means[start:end] for start, end in pairwise(ends)]
    rises = [f"loss {part[0]:.3f} after a cut, then {part[-1]:.3f}" for part in parts if part[-1] >= part[0]]
    worse = means[-1] >= means[CUTS[-1]]
    return (
        [*rises, f"loss {means[CUTS[-1]]:.3f} before the last cut, {means[-1]:.3f} at the end"]
        if worse
        else rises
    )


def _averages(averaging: Sequence[EMAWeightAveraging], module: Tiny) -> list[str]:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = [a._average_model.module.state_dict() for a in averaging if a._average_model is not None]
    same = all({name: tensor.shape for name, tensor in state.items()} == shapes for state in found)
    return [] if same and len(found) == len(averaging) else ["the average has other shapes than the network"]


def _ranks(module: Tiny) -> list[str]:
    if not torch.distributed.is_initialized():
        return []
    mine = [parameter.detach().double().sum().item() for parameter in module.parameters()]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, mine)
    return [] if all(other == mine for other in ranks) else ["ranks hold different weights"]
