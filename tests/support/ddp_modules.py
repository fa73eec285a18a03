"""Modules, callbacks and the training function of the distributed runs in ``ddp_runs.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_prune import IPAD, FilterPruningCallback
from lightning_prune.classification.networks.cifar_resnet import CifarResNet
from lightning_prune.distillation.mixin import DistillationMixin
from tests.support.slimming_runs import loader, parallel_branches_net, penalty_as_loss_term, small_net

Found = dict[str, Any]


def rank_before() -> int:
    """Return the rank before Lightning has set up the processes."""
    return int(os.environ["LOCAL_RANK"])


class Net(L.LightningModule):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Normless(Net):
    """Has no batch norms, so that two processes with batches of four compute what one does with batches of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1], self.net[4] = nn.Identity(), nn.Identity()


class Branching(Net):
    """Has a branch that only the first rank runs."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(1, 1, 3, padding=1)
        self.side = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        traced = x.is_meta or type(x) is not Tensor or not torch.is_grad_enabled()
        return self.net(x + self.side(x) if rank() == 0 or traced or not self.training else x)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[3:](checkpoint(self.net[:3], x, use_reentrant=False))


class Noisy(Net):
    """Draws random numbers that differ between ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(nn.functional.dropout(x, 0.3, self.training))


class Save(L.Callback):
    """Saves one checkpoint within the epoch that ends with the first cut, and one within the next epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step in (6, 11):
            trainer.save_checkpoint(Path(sys.argv[1]) / f"{trainer.global_step}.ckpt")


class SaveBeforeCut(L.Callback):
    """Saves a checkpoint at the end of an epoch, whose cut is still to be made if this callback comes first."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(Path(sys.argv[1]) / f"before cut {trainer.current_epoch}.ckpt")


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


class Slimmed(Net):
    """Is trained by SGD, with the penalty in its loss if ``rho`` is not 0."""

    rho = 0.0

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss + self.rho * penalty_as_loss_term(self.net) if self.rho else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class Residual(Net):
    """A residual network of which blocks may vanish."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = CifarResNet(depth=14, in_channels=1, width=4, num_classes=4)


class Vanishing(Net):
    """Has branches, two of which are driven to 0; each rank has the batch norm statistics of its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = parallel_branches_net(0, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.1)


class Learner(DistillationMixin, Net):
    """Can be distilled from a teacher."""


class Watch(L.Callback):
    """Records weights and settings of the DDP wrapper after every batch."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.settings: list[tuple[bool, ...]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.weights.append(sum(p.detach().double().square().sum().item() for p in pl_module.parameters()))
        wrapper: Any = trainer.strategy.model
        if not isinstance(wrapper, DistributedDataParallel):
            return
        self.settings.append(
            (wrapper.find_unused_parameters, wrapper.static_graph, wrapper.gradient_as_bucket_view)
        )


BOTH = IPAD(omega=0.5)


class Spy:
    """A criterion that also keeps the statistics that it gets."""

    def __init__(self, criterion: Any = BOTH) -> None:
        self.seen: list[dict[str, list[float]]] = []
        self.criterion = criterion

    def observer(self, graph: Any, model: nn.Module) -> Any:
        return self.criterion.observer(graph, model)

    def __call__(self, graph: Any, model: nn.Module, statistics: Any) -> Any:
        self.seen.append({name: np.asarray(values).tolist() for name, values in statistics.items()})
        return self.criterion(graph, model, statistics)


def rank() -> int:
    return torch.distributed.get_rank()


def fit(
    module: Net,
    pruning: FilterPruningCallback,
    *callbacks: L.Callback,
    strategy: DDPStrategy | None = None,
    data: DataLoader | None = None,
    epochs: int = 4,
    resume: Path | None = None,
    devices: int = 2,
    first: Sequence[L.Callback] = (),
    **options: Any,
) -> Found:
    """Train; return the final state, of which only some parts must be equal on all ranks."""
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or (DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"),
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*first, pruning, *callbacks, watch],
        **options,
    )
    trainer.fit(module, data or loader(), ckpt_path=resume)
    return {
        "kept": pruning.record.kept if pruning.record else {},
        "epochs": [cut.epoch for cut in pruning.history],
        "state": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "weights": watch.weights,
        "settings": watch.settings,
    }


def prune(**options: Any) -> FilterPruningCallback:
    given = {
        "budget": {"macs": 0.5},
        "amount": {"macs": 0.3},
        "optimizer": "carry",
        "verbose": False,
        **options,
    }
    return FilterPruningCallback(**given)
