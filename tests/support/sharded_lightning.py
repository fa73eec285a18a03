"""A training under Lightning, in one process or sharded over two: ``python sharded_lightning.py FOLDER`` in each."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_prune import FilterPruningCallback
from tests.support.sharded_runs import Branches, images, mean, shard, whole


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = Branches(), list[float]()
        self.example_input_array = images()[0][:1]

    def configure_model(self) -> None:
        if self.trainer.world_size > 1 and not type(self.net).__name__.startswith("FSDP"):
            shard(self.net, 2, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(mean(loss.detach().clone()))
        return loss

    def train_dataloader(self) -> Any:
        share = 8 // self.trainer.world_size
        own = slice(self.trainer.global_rank * share, (self.trainer.global_rank + 1) * share)
        pixels, labels = images()
        pairs = zip(pixels.split(8), labels.split(8), strict=True)
        return DataLoader([(x[own], y[own]) for x, y in pairs], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(folder: Path, world: int, resume: str | None = None) -> tuple[Module, FilterPruningCallback]:
    module = Module()
    callback = FilterPruningCallback(
        {"macs": 0.5},
        amount={"macs": 0.2},
        submodule="net",
        compensate=False,  # each process would draw the images of its own share
        verbose=False,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if world > 1 else "auto",
        max_epochs=5 if resume is None else 6,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[callback, ModelCheckpoint(folder, save_last=True)] if resume is None else [callback],
        enable_checkpointing=resume is None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=resume)
    return module, callback


def result(module: Module, callback: FilterPruningCallback) -> dict[str, Any]:
    assert callback.record is not None
    return {
        "losses": module.losses,
        "record": callback.record.to_dict(),
        "cuts": [cut.epoch for cut in callback.history],
        "weights": {name: whole(value.detach()) for name, value in module.net.named_parameters()},
        "class": type(module.net).__name__,
    }


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    module, callback = fit(folder, 2)
    results = result(module, callback)
    try:
        fit(folder, 2, str(folder / "last.ckpt"))
    except BaseException as error:  # that of a distributed checkpoint is no Exception
        results["resume"] = "\n".join([str(error), *getattr(error, "__notes__", [])])
    torch.save(results, folder / f"{module.trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
