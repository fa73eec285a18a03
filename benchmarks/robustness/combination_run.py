"""One short pruning run in one combination of settings, and its errors."""

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
    """Settings of one run, which are the first columns of the table.

    Attributes:
        optimizer: key of ``OPTIMIZERS``.
        state: of the optimizer after a cut: ``carry`` or ``reset``.
        precision: of the trainer.
        compiled: whether ``torch.compile`` is used.
        accumulate: batches per optimizer step.
        averaged: whether a moving average of the weights is kept.
        processes: number of processes (``ddp`` if more than 1).
    """

    optimizer: str = "AdamW fused"
    state: str = "carry"
    precision: str = "32-true"
    compiled: bool = False
    accumulate: int = 1
    averaged: bool = False
    processes: int = 1


@dataclass(frozen=True)
class Outcome:
    """Result of one run: its errors (empty if it is right), the loss of each epoch, the MACs after each cut."""

    wrong: list[str]
    losses: list[float]
    shares: list[float]


class StripeClassifier(L.LightningModule):
    """A tiny classifier of stripes; keeps the losses of each epoch."""

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
        """Return logits (n, 4) of images (n, 1, 12, 12)."""
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        """Begin a list of losses."""
        self.losses.append([])

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the cross-entropy."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses[-1].append(loss.item())
        return loss

    def configure_optimizers(self) -> optim.Optimizer:
        """Return the optimizer of the combination."""
        return OPTIMIZERS[self.optimizer](self.parameters())

    def mean_losses(self) -> list[float]:
        """Return the mean loss of each epoch."""
        return [sum(epoch) / len(epoch) for epoch in self.losses]


class Inspector(L.Callback):
    """Checks parameters and optimizer state at the end of each epoch, before the cut."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the parameters."""
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that each parameter has changed, and that its state has its shape."""
        epoch = trainer.current_epoch
        unchanged = [name for name, p in pl_module.named_parameters() if torch.equal(p, self.before[name])]
        self.wrong += [f"epoch {epoch}: {name} did not change" for name in unchanged]
        names = {p: name for name, p in pl_module.named_parameters()}
        for parameter, state in trainer.optimizers[0].state.items():
            shapes = {tuple(value.shape) for value in state.values() if isinstance(value, Tensor)}
            unexpected = shapes - _valid_shapes(parameter)
            self.wrong += [f"epoch {epoch}: state of {names[parameter]} has shape {s}" for s in unexpected]


def _valid_shapes(parameter: Tensor) -> set[tuple[int, ...]]:
    """Return the shapes that state may have: the parameter's, a scalar, and a row or column of it (Adafactor)."""
    shape = tuple(parameter.shape)
    row, column = (*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])
    return {shape, (), *({row, column} if len(shape) > 1 else ())}


def data(processes: int) -> DataLoader:
    """Return a loader of noisy stripes; the number of batches does not depend on the number of processes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 4
    stripes = torch.stack([(torch.arange(144) % (n + 2) == 0).float().reshape(1, 12, 12) for n in range(4)])
    x = stripes[y] + 0.7 * torch.randn(96, 1, 12, 12, generator=generator)
    return DataLoader(TensorDataset(x, y), 16 // processes)


def run(combination: Combination, backend: str = "aot_eager", accelerator: str = "") -> Outcome:
    """Train and prune once.

    Args:
        combination: the settings.
        backend: of ``torch.compile``.
        accelerator: of the trainer; by default the CPU, except for 16-mixed.
    """
    torch.compiler.reset()
    module, inspector = StripeClassifier(combination.optimizer), Inspector()
    if combination.compiled:
        module.net.compile(backend=backend)
    pruning = _pruning(combination)
    averaging = [EMAWeightAveraging(decay=0.9)] if combination.averaged else []
    accelerator = accelerator or ("gpu" if combination.precision == "16-mixed" else "cpu")
    trainer = _trainer(combination, [inspector, pruning, *averaging], accelerator)
    trainer.fit(module, data(combination.processes))
    wrong = [
        *inspector.wrong,
        *_check_cuts(pruning),
        *_check_losses(module.mean_losses()),
        *_check_averages(averaging, module),
        *_check_ranks(module),
    ]
    return Outcome(wrong, module.mean_losses(), [cut.share["macs"] for cut in pruning.history])


def _pruning(combination: Combination) -> FilterPruningCallback:
    return FilterPruningCallback(
        {"macs": 0.5},
        amount={"macs": 0.25},
        start_epoch=CUTS[0],
        every_n_epochs=CUTS[1] - CUTS[0],
        optimizer=combination.state,  # type: ignore[arg-type]
        verbose=False,
    )


def _trainer(combination: Combination, callbacks: list[L.Callback], accelerator: str) -> L.Trainer:
    return L.Trainer(
        max_epochs=EPOCHS,
        accelerator=accelerator,
        devices=combination.processes,
        strategy="ddp" if combination.processes > 1 else "auto",
        precision=combination.precision,  # type: ignore[arg-type]
        accumulate_grad_batches=combination.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _check_cuts(pruning: FilterPruningCallback) -> list[str]:
    epochs = tuple(cut.epoch for cut in pruning.history)
    return [] if epochs == CUTS else [f"cuts at the end of epochs {epochs}, not {CUTS}"]


def _check_losses(losses: Sequence[float]) -> list[str]:
    """Check that the loss falls between cuts, and ends below the loss before the last cut."""
    ends = (0, *(epoch + 1 for epoch in CUTS), len(losses))
    parts = [losses[start:end] for start, end in pairwise(ends)]
    wrong = [f"loss {part[0]:.3f} after a cut, then {part[-1]:.3f}" for part in parts if part[-1] >= part[0]]
    before, end = losses[CUTS[-1]], losses[-1]
    if end >= before:
        wrong.append(f"loss {before:.3f} before the last cut, {end:.3f} at the end")
    return wrong


def _check_averages(averaging: Sequence[EMAWeightAveraging], module: StripeClassifier) -> list[str]:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    states = [a._average_model.module.state_dict() for a in averaging if a._average_model is not None]
    same = all({name: tensor.shape for name, tensor in state.items()} == shapes for state in states)
    return [] if same and len(states) == len(averaging) else ["the average has other shapes than the network"]


def _check_ranks(module: StripeClassifier) -> list[str]:
    if not torch.distributed.is_initialized():
        return []
    sums = [parameter.detach().double().sum().item() for parameter in module.parameters()]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, sums)
    return [] if all(other == sums for other in ranks) else ["ranks have different weights"]
