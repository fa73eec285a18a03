"""The process that :mod:`benchmarks.robustness.distributed` starts: a training on CPU with gloo.

    python -m benchmarks.robustness.distributed_run FOLDER SETTINGS

``SETTINGS`` is a :class:`Run` as JSON. The normal launcher of Lightning starts this command again for each further
rank. Each rank writes ``rank N.pt`` to the folder; the main process of ``ddp_spawn`` and ``ddp_fork``, which trains
nothing itself, writes ``main.pt``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.robustness.kill_run import Classifier, Stripes
from lightning_prune import AtomicCheckpointIO, FilterPruningCallback, last_checkpoint
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.utils.hashing import network_digest

__all__ = ["EPOCHS", "Run"]

EPOCHS = 6
FIRST, SAMPLES = 12, 18  # number of unequal samples of the first rank, and of both


@dataclass(frozen=True)
class Run:
    """Settings of a run.

    Attributes:
        strategy: of the trainer.
        processes: number of them.
        epochs: after which it ends.
        kill: rank that kills itself in the middle, after the first cut; -1: none.
        save_step: optimizer step after which a checkpoint is written; 0: only at the ends of epochs.
        unequal: "": the distributed sampler deals out the samples; "samples": the second rank has fewer samples in as
            many batches; "batches": it has fewer batches; "limited": likewise, of which both use two; "whole": one
            process has the samples of both.
    """

    strategy: str = "ddp"
    processes: int = 2
    epochs: int = EPOCHS
    kill: int = -1
    save_step: int = 0
    unequal: str = ""


class Watch(L.Callback):
    """Notes the weights after every batch, kills a rank, and writes what this rank has at the end of training."""

    def __init__(self, run: Run, folder: Path, pruning: FilterPruningCallback) -> None:
        self.run, self.folder, self.pruning = run, folder, pruning
        self.weights: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Note a digest of the parameters; batch norms have the statistics of their own rank."""
        self.weights.append(network_digest(nn.ParameterList(pl_module.parameters())))
        if trainer.global_step == self.run.save_step:
            trainer.save_checkpoint(self.folder / "within.ckpt")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Kill this process."""
        if len(self.pruning.history) == 1 and self.run.kill == trainer.global_rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file of this rank."""
        content = {**found(pl_module, self.pruning), "weights": self.weights}
        torch.save(content, self.folder / f"rank {trainer.global_rank}.pt")


class Seen:
    """The default criterion, which also keeps the importance of the first cut."""

    def __init__(self) -> None:
        self.criterion, self.importance = default_criterion(), []

    def observer(self, graph: Any, model: nn.Module) -> Any:
        """Return the observer of the criterion."""
        return self.criterion.observer(graph, model)

    def __call__(self, graph: Any, model: nn.Module, statistics: Any) -> Any:
        """Return the importance, and keep it."""
        importance = self.criterion(graph, model, statistics)
        self.importance = self.importance or np.asarray(importance).tolist()
        return importance


class Unscheduled(Classifier):
    """Has no scheduler that needs validation."""

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 1e-2)


class Still(Classifier):
    """Is not changed by training, so that one process has the activations that several ones have."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[4], self.net[6] = nn.Identity(), nn.Identity(), nn.Identity()

    def configure_optimizers(self) -> Any:
        """Return an optimizer that changes nothing."""
        return torch.optim.SGD(self.parameters(), 0.0)


class Fixed(Dataset):
    """Samples that are the same in every process."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 12, 12, generator=generator) + index % 4, index % 4


def loader(run: Run) -> DataLoader:
    """Return the loader of this process."""
    if not run.unequal:
        return DataLoader(Stripes(), 4, shuffle=True)
    if run.unequal == "whole":
        return DataLoader(Fixed(), 6)
    second = os.environ.get("LOCAL_RANK", "0") == "1"
    samples = range(FIRST, SAMPLES) if second else range(FIRST)
    return DataLoader(Subset(Fixed(), samples), 2 if second and run.unequal == "samples" else 4)


def train(folder: Path, run: Run) -> None:
    """Train from the beginning or from the last checkpoint in ``folder``; write what this process has at the end."""
    L.seed_everything(
        0 if run.unequal else run.processes, verbose=False
    )  # a resume must not need the same seed
    module = Still() if run.unequal else Unscheduled()
    criterion = Seen() if run.unequal else None
    pruning = FilterPruningCallback(
        {"macs": 0.5}, amount={"macs": 0.2}, criterion=criterion, compensate=not run.unequal, verbose=False
    )
    resume = last_checkpoint(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=run.processes,
        strategy=DDPStrategy(process_group_backend="gloo") if run.strategy == "ddp" else run.strategy,
        max_epochs=run.epochs,
        limit_train_batches=2 if run.unequal == "limited" else None,
        use_distributed_sampler=not run.unequal,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning, ModelCheckpoint(folder, save_top_k=-1), Watch(run, folder, pruning)],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(module, loader(run), ckpt_path=resume)
    if run.strategy in ("ddp_spawn", "ddp_fork"):
        torch.save(found(module, pruning), folder / "main.pt")


def found(module: nn.Module, pruning: FilterPruningCallback) -> dict[str, Any]:
    """Return what a process has at the end."""
    return {
        "state": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "record": pruning.record.to_dict() if pruning.record else None,
        "cuts": [(cut.epoch, cut.filters, cut.after) for cut in pruning.history],
        "macs": pruning.history[-1].share["macs"] if pruning.history else 1.0,
        "within_budget": pruning.within_budget,
        "importance": getattr(pruning.criterion, "importance", []),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Run(**json.loads(sys.argv[2])))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a process that exits while its peer is still connected may abort
        torch.distributed.destroy_process_group()
